"""Why sandboxes ended, as the next hive finds it on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from ash_hub.lifecycle.endings import Endings, FileEndings
from ash_hub.lifecycle.record import Ending, Record
from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import ConnectFailed, SandboxGone
from ash_mcp.types import DEFAULT_SCOPE, Cause, EndReason, SandboxId, SessionName, State
from ash_router.store.base import Shelf
from ash_router.store.memory import MemoryStore
from tests.hub.world import LOCAL, MakeWorld

HOUR = 3600.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ended(name: str, at: float, reason: EndReason = EndReason.PROCESS_DIED) -> Sandbox:
    sandbox = Sandbox(
        id=SandboxId(f"sbx-{name}"),
        record=Record(
            owner="local",
            scope=DEFAULT_SCOPE,
            session=SessionName(name),
            recipe="test",
            maker="alone",
            created_at=0.0,
            start_by=60.0,
            expires_at=HOUR,
            idle_seconds=None,
            ready_at=at,
            labels={"a": "b"},
        ),
    )
    sandbox.bury(reason, "exited with code 1", at)
    return sandbox


def test_what_was_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    sandbox = ended("one", at=10.0)
    FileEndings(tmp_path, HOUR).keep(sandbox, 10.0)
    (found,) = FileEndings(tmp_path, HOUR).load(20.0)
    assert found.info(None) == sandbox.info(None)
    assert str(found.gone(20.0)) == str(sandbox.gone(20.0))
    assert found.ended.is_set() and found.settled.is_set()


def test_the_first_reason_stays(tmp_path: Path) -> None:
    FileEndings(tmp_path, HOUR).keep(ended("one", at=10.0, reason=EndReason.DESTROYED), 10.0)
    FileEndings(tmp_path, HOUR).keep(ended("one", at=11.0, reason=EndReason.LOST), 11.0)
    assert [it.reason for it in FileEndings(tmp_path, HOUR).load(20.0)] == [EndReason.DESTROYED]


def test_what_ended_long_ago_is_gone(tmp_path: Path) -> None:
    for name, at in (("old", 10.0), ("new", 11.0)):
        FileEndings(tmp_path, HOUR).keep(ended(name, at), at)
    assert [it.session for it in FileEndings(tmp_path, HOUR).load(10.0 + HOUR)] == ["new"]
    assert [file.stem for file in tmp_path.iterdir()] == ["sbx-new"]


def test_an_end_in_the_future_counts_from_now(tmp_path: Path) -> None:
    FileEndings(tmp_path, HOUR).keep(ended("one", at=5000.0), 5000.0)
    assert [it.ended_at for it in FileEndings(tmp_path, HOUR).load(20.0)] == [20.0]


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    endings = FileEndings(tmp_path, HOUR, most=2)
    for number in range(4):
        endings.keep(ended(f"n{number}", float(number)), float(number))
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["sbx-n2", "sbx-n3"]
    endings = FileEndings(tmp_path, HOUR, most=1)
    assert [it.session for it in endings.load(20.0)] == ["n3"]
    endings.keep(ended("n4", 4.0), 4.0)
    assert [file.stem for file in tmp_path.iterdir()] == ["sbx-n4"]


@pytest.mark.parametrize("change", [{"record": {"version": 1}}, {"reason": "boredom"}, {"ended_at": None}])
def test_a_file_that_cannot_be_read_is_removed(tmp_path: Path, change: dict[str, object]) -> None:
    FileEndings(tmp_path, HOUR).keep(ended("one", 1.0), 1.0)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert FileEndings(tmp_path, HOUR).load(2.0) == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_kept_is_said_and_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    FileEndings(tmp_path / "file" / "ended", HOUR).keep(ended("one", 1.0), 1.0)
    assert "why sbx-one ended cannot be kept" in caplog.text


@pytest.mark.anyio
async def test_what_is_kept_in_the_store_comes_back_as_it_was_and_writes_no_file(tmp_path: Path) -> None:
    store, sandbox = MemoryStore(), ended("one", at=10.0, reason=EndReason.DESTROYED)
    await Endings(store, HOUR).keep(ended("two", at=12.0), 12.0)
    for kept in (sandbox, ended("one", at=11.0, reason=EndReason.LOST)):
        await Endings(store, HOUR).keep(kept, 10.0)
    found, other = await Endings(store, HOUR).load(20.0)
    assert found.info(None) == sandbox.info(None) and other.session == "two"
    assert str(found.gone(20.0)) == str(sandbox.gone(20.0))
    assert found.ended.is_set() and found.settled.is_set()


@pytest.mark.anyio
async def test_what_is_kept_in_the_store_is_bounded_and_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash_hub.lifecycle.endings.MOST", 2)
    now = [0.0]
    store = MemoryStore(lambda: now[0])
    for number in range(3):
        now[0] = float(number)
        await Endings(store, HOUR).keep(ended(f"n{number}", now[0]), now[0])
    assert [it.session for it in await Endings(store, HOUR).load(now[0])] == ["n1", "n2"]
    now[0] = HOUR + 1.0
    assert [it.session for it in await Endings(store, HOUR).load(now[0])] == ["n2"]


@pytest.mark.anyio
async def test_what_a_store_has_of_another_version_is_passed_over() -> None:
    store = MemoryStore()
    await store.keep(Shelf("ended", 10, 1000, HOUR), "sbx-newer", '{"record": {"version": 99}}')
    await Endings(store, HOUR).keep(ended("one", at=10.0), 10.0)
    assert [it.session for it in await Endings(store, HOUR).load(20.0)] == ["one"]


@pytest.mark.anyio
async def test_a_store_that_is_away_keeps_no_sandbox_from_ending(caplog: pytest.LogCaptureFixture) -> None:
    class Away(MemoryStore):
        async def keep(self, shelf: Shelf, name: str, text: str) -> None:
            raise ConnectFailed("the store is away")

        async def kept(self, shelf: Shelf, name: str | None = None) -> Mapping[str, str]:
            raise ConnectFailed("the store is away")

    await Endings(Away(), HOUR).keep(ended("one", at=10.0), 10.0)
    assert "why sbx-one ended cannot be kept" in caplog.text
    assert await Endings(Away(), HOUR).load(20.0) == []


@pytest.mark.anyio
async def test_the_next_hive_knows_why_and_a_name_is_the_living_ones(make_world: MakeWorld) -> None:
    old = await make_world()
    first, second = [await old.spawn(session=name) for name in ("first", "second")]
    await old.sandboxes.destroy([first, second])
    again = await old.spawn(session="second")
    new = await make_world()
    await new.controller.start()
    for name in ("first", first.id, second.id):
        with pytest.raises(SandboxGone, match="it was destroyed") as gone:
            new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, name)
        assert gone.value.data["reason"] == "destroyed"
    assert new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "second").id == again.id
    new.clock[0] += HOUR
    await new.look()
    third = await make_world()
    await third.controller.start()
    assert [it.id for it in third.sandboxes.registry.all()] == [again.id]  # its time was over only now


@pytest.mark.anyio
async def test_the_next_hive_learns_what_ended_while_there_was_none(make_world: MakeWorld) -> None:
    old = await make_world()
    died, ending, unfinished = [await old.spawn() for _ in range(3)]
    await old.sandboxes.stop(keep=True)
    old.life.cancel()
    over = Ending(reason=EndReason.TTL_EXPIRED, cause=Cause.LIMIT, at=1000.0, by="alone")
    await old.backend.annotate(ending.id, replace(ending.record, ending=over).to_json(), revision=1)
    await old.backend.annotate(unfinished.id, replace(unfinished.record, ready_at=None).to_json(), revision=1)
    old.backend.die(died.id, "killed: out of memory", Cause.LIMIT)
    for _ in range(2):
        new = await make_world()
        await new.controller.start()
        found = {it.id: (it.state, it.reason, it.cause) for it in new.sandboxes.registry.all()}
        assert found == {
            died.id: (State.FAILED, EndReason.PROCESS_DIED, Cause.LIMIT),
            ending.id: (State.GONE, EndReason.TTL_EXPIRED, Cause.LIMIT),
            unfinished.id: (State.FAILED, EndReason.START_FAILED, Cause.HIVE),
        }
        with pytest.raises(SandboxGone, match="out of memory"):
            new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, died.session)
        assert await new.backend.list() == []


@pytest.mark.anyio
async def test_what_the_last_hive_ended_and_could_not_remove_is_removed(make_world: MakeWorld) -> None:
    old = await make_world()
    sandbox = await old.spawn()
    (left,) = await old.backend.list()
    await old.sandboxes.destroy([sandbox])
    old.life.cancel()
    old.backend._instances[left.id] = left  # pyright: ignore[reportPrivateUsage]
    new = await make_world()
    await new.controller.start()
    assert await new.backend.list() == []
    assert [it.reason for it in new.sandboxes.registry.all()] == [EndReason.DESTROYED]
