"""Pinned toolsets are found by any replica, whatever was lost, and forgotten when nobody uses them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import anyio
import pytest

from ash_hub.backends.documents import MAX_DOCUMENT_BYTES, DocumentKind
from ash_hub.backends.memory import MemoryBackend, MemoryDocuments
from ash_hub.spawning.toolset_shelf import CACHE, GRACE_SECONDS, ToolsetShelf
from ash_hub.spawning.toolsets import Toolset, pin
from ash_mcp.errors import ConnectFailed, StartFailed
from ash_mcp.types import SandboxId, SandboxSpec
from ash_router.store.base import Shelf
from ash_router.store.memory import MemoryStore

pytestmark = pytest.mark.anyio

SETS = DocumentKind.TOOLSETS
OTHERS = "f" * 64


class Documents(MemoryDocuments):
    """Counts what it is asked, and does as it is told."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.reads = self.writes = 0
        self.is_away = False
        self.before_drop: Callable[[], Any] | None = None

    async def read(self, kind: DocumentKind, name: str) -> bytes | None:
        self.reads += 1
        if self.is_away:
            raise ConnectFailed("the platform is away")
        return await super().read(kind, name)

    async def keep(self, kind: DocumentKind, name: str, body: bytes) -> None:
        self.writes += 1
        if self.is_away:
            raise ConnectFailed("the platform is away")
        await super().keep(kind, name, body)

    async def drop(self, kind: DocumentKind, name: str, *, used_at: float) -> None:
        if self.before_drop is not None:
            await self.before_drop()
        await super().drop(kind, name, used_at=used_at)


class Backend(MemoryBackend):
    def __init__(self) -> None:
        super().__init__()
        self.time = 1_000_000.0
        self.kept = Documents(lambda: self.time)
        self.documents = self.kept

    async def use(self, name: str, record: Mapping[str, Any]) -> SandboxId:
        spec = SandboxSpec(id=SandboxId(f"sbx-{name}"), recipe="test", server={"python": "a:b"})
        return (await self.create(replace(spec, record=record))).id


def shelf_on(backend: Backend, store: MemoryStore) -> ToolsetShelf:
    return ToolsetShelf(backend, store, lambda: backend.time)


class Away(MemoryStore):
    async def keep(self, shelf: Shelf, name: str, text: str) -> None:
        raise ConnectFailed("the store is away")

    async def kept(self, shelf: Shelf, name: str | None = None) -> Mapping[str, str]:
        raise ConnectFailed("the store is away")


class Silent(MemoryStore):
    async def keep(self, shelf: Shelf, name: str, text: str) -> None:
        await anyio.sleep_forever()

    async def kept(self, shelf: Shelf, name: str | None = None) -> Mapping[str, str]:
        await anyio.sleep_forever()
        raise AssertionError


@pytest.fixture
def backend() -> Backend:
    return Backend()


def toolset(name: str = "run", **more: Any) -> Toolset:
    listed: dict[str, Any] = {
        "name": name,
        "description": "Läuft.",
        "inputSchema": {"type": "object", "properties": {"b": {}}},
    }
    return pin([{**listed, **more}, {"name": 7}], {})


async def kept(backend: Backend) -> set[str]:
    return set(await backend.documents.used(SETS))


async def test_a_replica_that_never_saw_the_maker_has_its_tools(backend: Backend) -> None:
    store, made = MemoryStore(), toolset()
    assert await shelf_on(backend, store).put(made) is made
    for stores, reads in ((store, 0), (MemoryStore(), 1), (store, 1)):
        found = await shelf_on(backend, stores).get(made.digest)
        assert found is not None and found.tools == made.tools and found.digest == made.digest
        assert backend.kept.reads == reads  # the store is a cache, and an emptied one is filled again


async def test_what_was_read_from_the_backend_is_in_the_store_for_the_next(backend: Backend) -> None:
    store, made = MemoryStore(), toolset()
    await shelf_on(backend, MemoryStore()).put(made)
    for _ in range(2):
        assert await shelf_on(backend, store).get(made.digest) is not None
    assert backend.kept.reads == 1


@pytest.mark.parametrize("store", [Away(), Silent()], ids=["away", "silent"])
async def test_a_store_that_is_away_fails_neither_a_spawn_nor_a_read(backend: Backend, store: MemoryStore) -> None:
    made = toolset()
    with anyio.fail_after(3):
        assert await shelf_on(backend, store).put(made) is made
        assert (await shelf_on(backend, store).get(made.digest)) is not None


async def test_a_backend_that_is_away_fails_a_spawn_and_is_no_absence(backend: Backend) -> None:
    backend.kept.is_away = True
    with pytest.raises(StartFailed, match="tools cannot be kept: the platform is away") as failure:
        await shelf_on(backend, MemoryStore()).put(toolset())
    assert failure.value.data["step"] == "tools"
    with pytest.raises(ConnectFailed):
        await shelf_on(backend, MemoryStore()).get(toolset().digest)
    assert await shelf_on(backend, MemoryStore()).get("None") is None
    backend.kept.is_away = False
    shelf = shelf_on(backend, MemoryStore())
    await shelf.put(toolset())
    assert await kept(backend) == {toolset().digest}


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"tools":[]}', '{"tools":[{"name":1}]}', '{"tools":7}', "[" * 100_000, "other"]
)
async def test_what_has_another_hash_counts_as_absent(backend: Backend, damage: str) -> None:
    if damage == "other":
        await shelf_on(backend, MemoryStore()).put(other := toolset("other"))
        damage = (await backend.documents.read(SETS, other.digest) or b"").decode()
    made, store = toolset(), MemoryStore()
    await store.keep(CACHE, made.digest, damage)
    await shelf_on(backend, MemoryStore()).put(made)
    found = await shelf_on(backend, store).get(made.digest)
    assert found is not None and found.tools == made.tools
    await backend.documents.keep(SETS, OTHERS, damage.encode())
    assert await shelf_on(backend, store).get(OTHERS) is None


async def test_what_earlier_hives_wrote_is_read(backend: Backend) -> None:
    made = toolset()
    body = {"tools": [tool.fields() for tool in made.tools], "notes": ["a note"]}
    await backend.documents.keep(SETS, made.digest, json.dumps(body).encode())
    found = await shelf_on(backend, MemoryStore()).get(made.digest)
    assert found is not None and found.tools == made.tools


async def test_a_list_over_the_limit_of_a_document_fails_its_start_and_says_the_number(backend: Backend) -> None:
    (tool,) = toolset().tools
    made = Toolset("0" * 64, tuple(replace(tool, description="x" * 4096) for _ in range(260)))
    with pytest.raises(StartFailed, match=rf"takes \d{{7}} bytes, and {MAX_DOCUMENT_BYTES} can be kept"):
        await shelf_on(backend, MemoryStore()).put(made)
    assert await kept(backend) == set()


@pytest.mark.parametrize("text", ["x", "語", "\n", '"'])
def test_what_is_pinned_of_the_largest_list_can_be_kept(text: str) -> None:
    from ash_hub.spawning.toolset_shelf import _text_of  # pyright: ignore[reportPrivateUsage]

    schema = {"type": "object", "properties": {f"p{n}": {"description": text * 1300} for n in range(8)}}
    listed = [{"name": f"t{n}", "description": text * 4096, "inputSchema": schema} for n in range(300)]
    made = pin(listed, {})
    assert made.tools and len(_text_of(made).encode()) <= MAX_DOCUMENT_BYTES


async def test_of_equal_toolsets_there_is_one_while_somebody_uses_it(backend: Backend) -> None:
    shelf = shelf_on(backend, MemoryStore())
    first = await shelf.put(toolset())
    assert await shelf.put(toolset()) is first and await shelf.get(first.digest) is first
    del first
    gc.collect()
    assert not shelf._known  # pyright: ignore[reportPrivateUsage]


async def test_spawns_of_one_recipe_note_their_use_now_and_then(backend: Backend) -> None:
    shelf = shelf_on(backend, MemoryStore())
    for _ in range(5):
        await shelf.put(toolset())
    assert backend.kept.writes == 1
    for number in range(5):
        await shelf.put(toolset(f"other{number}"))
    backend.time += 700
    await shelf.put(toolset())
    assert backend.kept.writes == 7
    assert len(shelf._kept_at) == 1  # pyright: ignore[reportPrivateUsage]
    assert (await backend.documents.used(SETS))[toolset().digest] == backend.time


async def test_a_document_that_nobody_uses_is_dropped_after_the_grace(backend: Backend) -> None:
    shelf = shelf_on(backend, MemoryStore())
    used, unused = await shelf.put(toolset("used")), await shelf.put(toolset("unused"))
    sandbox_id = await backend.use("one", {"toolset": used.digest})
    await backend.use("starting", {"toolset": None})
    await shelf.prune()
    assert await kept(backend) == {used.digest, unused.digest}
    backend.time += GRACE_SECONDS
    await shelf.prune()
    assert await kept(backend) == {used.digest}
    await backend.delete(sandbox_id)
    backend.time += GRACE_SECONDS - 1
    await shelf.prune()
    assert await kept(backend) == {used.digest}
    backend.time += 1
    await shelf.prune()
    assert await kept(backend) == set()


async def test_a_sandbox_that_died_uses_nothing(backend: Backend) -> None:
    shelf = shelf_on(backend, MemoryStore())
    made = await shelf.put(toolset())
    backend.die(await backend.use("one", {"toolset": made.digest}))
    backend.time += GRACE_SECONDS
    await shelf.prune()
    assert await kept(backend) == set()


async def test_while_there_is_a_record_that_cannot_be_read_nothing_is_dropped(backend: Backend) -> None:
    shelf = shelf_on(backend, MemoryStore())
    await shelf.put(toolset())
    sandbox_id = await backend.use("newer", {"version": 99, "layers": ["?"]})
    backend.time += GRACE_SECONDS
    await shelf.prune()
    assert len(await kept(backend)) == 1
    await backend.delete(sandbox_id)
    await shelf.prune()
    assert await kept(backend) == set()


async def test_a_document_that_a_spawn_pins_while_another_replica_drops_it_stays(backend: Backend) -> None:
    one, other = shelf_on(backend, MemoryStore()), shelf_on(backend, MemoryStore())
    made = await one.put(toolset())
    backend.time += 2 * GRACE_SECONDS

    async def spawn() -> None:  # after the other has looked at documents and records
        await one.put(toolset())
        await backend.use("new", {"toolset": made.digest})

    backend.kept.before_drop = spawn
    await other.prune()
    assert await kept(backend) == {made.digest}
    assert await shelf_on(backend, MemoryStore()).get(made.digest) is not None


async def test_a_document_of_a_spawn_whose_record_comes_later_stays(backend: Backend) -> None:
    one, other = shelf_on(backend, MemoryStore()), shelf_on(backend, MemoryStore())
    await one.put(toolset())
    backend.time += 500  # so that the next spawn notes no use, and has it for the shortest time that there is
    made = await one.put(toolset())
    backend.time += 600
    await other.prune()
    assert await kept(backend) == {made.digest}
