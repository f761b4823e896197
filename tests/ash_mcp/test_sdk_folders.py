"""Folders and long files of the SDK: one request through the door, and nothing of it leads out of the folder."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from ash_mcp import Sandbox, SandboxRefused
from ash_mcp.errors import ConfigError, FileNotFound
from ash_mcp.files import DOOR_BYTES
from ash_mcp.wire import HEADER_ORIGIN, ORIGIN_HUB, ORIGIN_SANDBOX
from tests.ash_mcp.twin import Script, TwinHive

pytestmark = pytest.mark.anyio

LARGE = os.urandom(DOOR_BYTES + 1)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "a" / "empty").mkdir(parents=True)
    (root / "a" / "large").write_bytes(LARGE)
    (root / "run.sh").write_text("#!/bin/sh")
    (root / "run.sh").chmod(0o755)
    (root / "a" / "link").symlink_to("../run.sh")
    return root


def everything(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else (path.stat().st_mode, path.is_dir() or path.read_bytes())
        for path in root.rglob("*")
    }


async def test_a_folder_goes_both_ways_in_one_request_each(box: Sandbox, twin: TwinHive, tree: Path, tmp_path: Path):
    told: list[tuple[int, int | None]] = []
    size = len(LARGE) + 9
    assert await box.files.upload(tree, "deep/tree", on_bytes=lambda done, total: told.append((done, total))) == size
    assert told[-1] == (size, size)
    told.clear()
    assert (
        await box.files.download(
            "deep/tree", tmp_path / "back", on_bytes=lambda done, total: told.append((done, total))
        )
        == size
    )
    assert told[-1] == (size, size)
    assert everything(tmp_path / "back") == everything(tree)
    assert [request.method for request in twin.through_door] == ["PUT", "GET"]


async def test_only_long_files_go_through_the_door(box: Sandbox, twin: TwinHive, tmp_path: Path):
    for data, through in ((LARGE[:-1], 0), (LARGE, 2)):
        (tmp_path / "f").write_bytes(data)
        await box.files.upload(tmp_path / "f", "f%41 ä/../f")
        assert await box.files.download("f%41 ä/../f", tmp_path / "back") == len(data)
        assert (tmp_path / "back").read_bytes() == data and len(twin.through_door) == through


async def test_an_upload_whose_connection_breaks_is_sent_again(box: Sandbox, twin: TwinHive, tmp_path: Path):
    def breaks(request: httpx.Request) -> httpx.Response | None:
        raise httpx.ReadError("reset")

    (tmp_path / "f").write_bytes(LARGE)
    twin.scripts.append(breaks)
    assert await box.files.upload(tmp_path / "f", "f") == len(LARGE)
    twin.scripts.extend([lambda request: None, breaks])
    assert await box.files.download("f", tmp_path / "back") == len(LARGE)
    assert (tmp_path / "back").read_bytes() == LARGE


async def test_a_link_out_of_a_local_folder_is_told_before_anything_is_sent(box: Sandbox, twin: TwinHive, tree: Path):
    (tree / "out").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="leads out"):
        await box.files.upload(tree, "tree")
    assert twin.through_door == []


def answers(data: bytes, *, origin: str = ORIGIN_SANDBOX, status: int = 200) -> Script:
    return lambda request: httpx.Response(status, content=data, headers={HEADER_ORIGIN: origin})


def archive(name: str, **more: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        for key, value in more.items():
            setattr(member, key, value)
        tar.addfile(member)
    return out.getvalue()


HOSTILE = {
    "a name up": archive("../x"),
    "an absolute name": archive("/tmp/x"),
    "a link out": archive("l", type=tarfile.SYMTYPE, linkname="../x"),
    "an absolute link": archive("l", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": archive("h", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": archive("d", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "no archive": b"x" * 1000,
    "half an archive": archive("f", size=2000)[:900],
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_sandbox_writes_nothing_beside_the_folder(
    box: Sandbox, twin: TwinHive, tmp_path: Path, what: str
):
    await box.files.mkdir("folder")
    here = tmp_path / "here"
    here.mkdir()
    twin.scripts.extend([lambda request: None, answers(HOSTILE[what])])
    with pytest.raises(SandboxRefused):
        await box.files.download("folder", here / "target")
    assert [path.name for path in here.iterdir()] == ["target"] and list((here / "target").iterdir()) == []


async def test_no_link_that_stands_here_is_followed(box: Sandbox, tmp_path: Path):
    await box.files.write("folder/sub/f", "x")
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (target / "sub").symlink_to(outside)
    with pytest.raises(FileExistsError):
        await box.files.download("folder", target)
    assert list(outside.iterdir()) == []


async def test_a_failure_is_the_sandboxs_or_the_hives_by_its_origin(box: Sandbox, twin: TwinHive, tmp_path: Path):
    (tmp_path / "f").write_bytes(LARGE)
    said = b'{"error": {"kind": "file_not_found", "message": "gone"}}'
    twin.scripts.append(answers(said, status=404))
    with pytest.raises(FileNotFound, match="gone"):
        await box.files.upload(tmp_path / "f", "f")
    twin.scripts.append(answers(b"<html>", status=200, origin=ORIGIN_HUB))
    with pytest.raises(Exception, match="hive"):
        await box.files.upload(tmp_path / "f", "f")
