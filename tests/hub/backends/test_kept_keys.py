"""Keys that a backend keeps as documents: made once, changed by whoever read them last."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import anyio.lowlevel
import pytest

from ash_hub.backends import following, kept_keys
from ash_hub.backends.documents import MAX_DOCUMENT_BYTES, DocumentKind
from ash_hub.backends.kept_keys import awaited_hive_key, change_api_keys, keep_hive_key, read_api_keys
from ash_hub.backends.memory import MemoryDocuments
from ash_mcp.errors import ConfigError, Conflict, ConnectFailed, NotFound
from ash_router.admission.api_keys import ApiKey, add_key, revoke_keys
from ash_router.upstream.call_tokens import CallTokens

pytestmark = pytest.mark.anyio

KEYS = DocumentKind.KEYS


class Documents(MemoryDocuments):
    """Lets other tasks go first before each change, as a platform far away does."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)

    async def replace(self, kind: DocumentKind, name: str, body: bytes, *, instead_of: bytes | None) -> None:
        await anyio.lowlevel.checkpoint()
        await super().replace(kind, name, body, instead_of=instead_of)


async def test_replicas_that_start_at_once_have_one_key() -> None:
    documents, found = Documents(), set[str]()

    async def start() -> None:
        found.add(CallTokens(await keep_hive_key(documents)).public_key)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(start)
    assert found == {CallTokens(await keep_hive_key(documents)).public_key}


async def test_a_router_waits_for_the_key_of_the_first_hive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_keys, "_LOOK_SECONDS", 0.001)
    documents = Documents()
    with pytest.raises(ConfigError, match="no hive has started"):
        await awaited_hive_key(documents, 0.01)
    made = list[str]()

    async def start() -> None:
        await anyio.sleep(0.01)
        made.append(CallTokens(await keep_hive_key(documents)).public_key)

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        assert CallTokens(await awaited_hive_key(documents, 10)).public_key in made


async def test_changes_at_once_are_all_kept() -> None:
    documents = Documents()

    async def add(name: str) -> None:
        await change_api_keys(documents, lambda keys: add_key(keys, now=0.0, name=name))

    async with anyio.create_task_group() as group:
        for name in "abcd":
            group.start_soon(add, name)
    assert {key.name for key in await read_api_keys(documents)} == set("abcd")
    (gone,) = await change_api_keys(documents, lambda keys: revoke_keys(keys, ["b"]))
    assert gone.name == "b" and {key.name for key in await read_api_keys(documents)} == set("acd")


async def test_a_revocation_of_what_is_unknown_changes_nothing() -> None:
    documents = Documents()
    await change_api_keys(documents, lambda keys: add_key(keys, now=0.0, name="a"))
    before = await documents.read(KEYS, "keys")
    with pytest.raises(NotFound):
        await change_api_keys(documents, lambda keys: revoke_keys(keys, ["a", "nope"]))
    assert await documents.read(KEYS, "keys") == before


async def test_a_document_that_always_changes_is_given_up() -> None:
    class Restless(Documents):
        async def replace(self, kind: DocumentKind, name: str, body: bytes, *, instead_of: bytes | None) -> None:
            raise Conflict("it was replaced meanwhile")

    with anyio.fail_after(5), pytest.raises(ConnectFailed, match="try again"):
        await change_api_keys(Restless(), lambda keys: add_key(keys, now=0.0))


async def test_what_is_no_document_of_keys_is_refused_and_stays() -> None:
    documents = Documents()
    for name in ("hive", "keys"):
        await documents.replace(KEYS, name, b"{", instead_of=None)
    with pytest.raises(ConfigError, match="API keys of this version"):
        await change_api_keys(documents, lambda keys: add_key(keys, now=0.0))
    with pytest.raises(ConfigError, match="not an Ed25519 key"):
        await keep_hive_key(documents)
    assert await documents.read(KEYS, "keys") == b"{" == await documents.read(KEYS, "hive")


async def test_more_keys_than_a_document_holds_are_refused() -> None:
    key = ApiKey(id="x", sha256="0" * MAX_DOCUMENT_BYTES, subject="ann", created_at=0.0)

    def fill(keys: Sequence[ApiKey]) -> tuple[list[ApiKey], None]:
        return [*keys, key], None

    with pytest.raises(ConfigError, match="revoke"):
        await change_api_keys(Documents(), fill)


async def test_whoever_reads_a_document_repeatedly_outlives_its_absence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(following, "_EVERY_SECONDS", 0.001)

    class Away(Documents):
        reads = 0

        async def read(self, kind: DocumentKind, name: str) -> bytes | None:
            self.reads += 1
            if self.reads < 5:
                raise ConnectFailed("the platform is away")
            return b"1"

    back = anyio.Event()

    def tell(body: bytes | None) -> None:
        assert body == b"1"
        back.set()

    async with anyio.create_task_group() as group:
        group.start_soon(Away().follow, KEYS, "keys", tell)
        with anyio.fail_after(5):
            await back.wait()
        group.cancel_scope.cancel()
    assert caplog.text.count("cannot be read") == 1
