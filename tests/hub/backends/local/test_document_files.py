"""The hive's documents as files: whose they are, and what a disk or another process can do to them."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import anyio
import pytest

from ash_hub.backends.documents import DocumentKind
from ash_hub.backends.kept_keys import keep_hive_key
from ash_hub.backends.local import document_files as module
from ash_hub.backends.local.document_files import FileDocuments
from ash_mcp.errors import ConnectFailed
from ash_router.admission.api_keys import KeyFile
from ash_router.upstream.call_tokens import CallTokens, load_hive_key

pytestmark = pytest.mark.anyio

SETS, KEYS = DocumentKind.TOOLSETS, DocumentKind.KEYS


@pytest.fixture
def documents(tmp_path: Path) -> FileDocuments:
    return FileDocuments(tmp_path / "state", lambda: 1234.5)


async def test_files_are_their_users_alone_and_dated_in_the_hives_time(
    documents: FileDocuments, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        await documents.keep(SETS, "a", b"{}")
        await documents.replace(KEYS, "keys", b"{}", instead_of=None)
    finally:
        os.umask(before)
    files = [Path(folder, name) for folder, _, names in os.walk(tmp_path) for name in names]
    assert {path.name for path in files} == {"a.json", "toolsets.lock", "keys.json", "keys.lock"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    await anyio.Path(tmp_path / "state/toolsets/What is this.json").touch()
    assert dict(await documents.used(SETS)) == {"a": 1234.5}


async def test_the_keys_are_the_file_that_ash_key_writes(documents: FileDocuments, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "state" / "keys.json")
    file.add(name="one")
    body = await documents.read(KEYS, "keys")
    assert body is not None and b'"one"' in body
    await documents.replace(KEYS, "keys", body.replace(b'"one"', b'"two"'), instead_of=body)
    assert [key.name for key in file.read()] == ["two"]


async def test_the_hives_own_key_is_the_file_that_a_hive_reads(documents: FileDocuments, tmp_path: Path) -> None:
    public = CallTokens(await keep_hive_key(documents)).public_key
    assert CallTokens(load_hive_key(tmp_path / "state" / "hive.key")).public_key == public
    assert set(await documents.used(KEYS)) == {"hive"}


async def test_what_the_disk_refuses_is_typed_and_nothing_is_taken_for_absent(
    documents: FileDocuments, tmp_path: Path
) -> None:
    (tmp_path / "state" / "toolsets" / "a.json").mkdir(parents=True)
    with pytest.raises(ConnectFailed, match="Is a directory") as failure:
        await documents.read(SETS, "a")
    assert failure.value.retryable
    (tmp_path / "other").write_text("in the way")
    with pytest.raises(ConnectFailed, match=r"documents in .*other cannot be used"):
        await FileDocuments(tmp_path / "other", lambda: 0.0).keep(SETS, "a", b"{}")


async def test_a_process_that_holds_the_lock_is_waited_for_within_a_bound(
    documents: FileDocuments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.05)
    await documents.keep(SETS, "a", b"{}")
    lock = os.open(documents._state_dir / "toolsets.lock", os.O_RDWR)  # pyright: ignore[reportPrivateUsage]
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with anyio.fail_after(5), pytest.raises(ConnectFailed):
            await documents.keep(SETS, "a", b"{}")
        assert await documents.read(SETS, "a") == b"{}"
    finally:
        os.close(lock)
    await documents.keep(SETS, "a", b"{}")
