"""Why sandboxes ended, as the next hive finds it on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ash_hub import _state
from ash_hub._state import Step
from ash_hub.endings import Endings
from ash_hub.sandbox import Sandbox
from ash_mcp.errors import SandboxGone
from ash_mcp.types import DEFAULT_SCOPE, EndReason, SandboxId, SessionName, State
from tests.hub.world import LOCAL, MakeWorld

HOUR = 3600.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def ended(name: str, at: float, reason: EndReason = EndReason.PROCESS_DIED) -> Sandbox:
    sandbox = Sandbox(
        id=SandboxId(f"sbx-{name}"),
        owner="local",
        scope=DEFAULT_SCOPE,
        session=SessionName(name),
        recipe="test",
        life=_state.born(0.0, ttl_seconds=HOUR, idle_seconds=None),
        labels={"a": "b"},
    )
    sandbox.step(Step.START, at)
    sandbox.step(Step.READY, at)
    sandbox.step(Step.FAIL, at, reason, "exited with code 1")
    return sandbox


def test_what_was_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    sandbox = ended("one", at=10.0)
    Endings(tmp_path, HOUR).keep(sandbox, 10.0)
    (found,) = Endings(tmp_path, HOUR).load(20.0)
    assert found.info(None) == sandbox.info(None)
    assert str(found.gone(20.0)) == str(sandbox.gone(20.0))
    assert found.ended.is_set() and found.settled.is_set()


def test_the_first_reason_stays(tmp_path: Path) -> None:
    Endings(tmp_path, HOUR).keep(ended("one", at=10.0, reason=EndReason.DESTROYED), 10.0)
    Endings(tmp_path, HOUR).keep(ended("one", at=11.0, reason=EndReason.LOST), 11.0)
    assert [it.life.reason for it in Endings(tmp_path, HOUR).load(20.0)] == [EndReason.DESTROYED]


def test_what_ended_long_ago_is_gone(tmp_path: Path) -> None:
    for name, at in (("old", 10.0), ("new", 11.0)):
        Endings(tmp_path, HOUR).keep(ended(name, at), at)
    assert [it.session for it in Endings(tmp_path, HOUR).load(10.0 + HOUR)] == ["new"]
    assert [file.stem for file in tmp_path.iterdir()] == ["sbx-new"]


def test_an_end_in_the_future_counts_from_now(tmp_path: Path) -> None:
    Endings(tmp_path, HOUR).keep(ended("one", at=5000.0), 5000.0)
    assert [it.life.ended_at for it in Endings(tmp_path, HOUR).load(20.0)] == [20.0]


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    endings = Endings(tmp_path, HOUR, most=2)
    for number in range(4):
        endings.keep(ended(f"n{number}", float(number)), float(number))
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["sbx-n2", "sbx-n3"]
    endings = Endings(tmp_path, HOUR, most=1)
    assert [it.session for it in endings.load(20.0)] == ["n3"]
    endings.keep(ended("n4", 4.0), 4.0)
    assert [file.stem for file in tmp_path.iterdir()] == ["sbx-n4"]


@pytest.mark.parametrize("change", [{"record": {"version": 1}}, {"reason": "boredom"}, {"ended_at": None}])
def test_a_file_that_cannot_be_read_is_removed(tmp_path: Path, change: dict[str, object]) -> None:
    Endings(tmp_path, HOUR).keep(ended("one", 1.0), 1.0)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert Endings(tmp_path, HOUR).load(2.0) == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_kept_is_said_and_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    Endings(tmp_path / "file" / "ended", HOUR).keep(ended("one", 1.0), 1.0)
    assert "why sbx-one ended cannot be kept" in caplog.text


@pytest.mark.anyio
async def test_the_next_hive_knows_why_and_a_name_is_the_living_ones(make_world: MakeWorld) -> None:
    old = await make_world()
    first, second = [await old.spawn(session=name) for name in ("first", "second")]
    await old.sandboxes.destroy([first, second])
    again = await old.spawn(session="second")
    new = await make_world()
    new.sandboxes.recall()
    await new.reconciler.run_once()
    for name in ("first", first.id, second.id):
        with pytest.raises(SandboxGone, match="it was destroyed") as gone:
            new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, name)
        assert gone.value.data["reason"] == "destroyed"
    assert new.sandboxes.ready(LOCAL, DEFAULT_SCOPE, "second").id == again.id
    new.clock[0] += HOUR
    await new.sandboxes.forget()
    third = await make_world()
    third.sandboxes.recall()
    assert third.sandboxes.registry.all() == []


@pytest.mark.anyio
async def test_the_next_hive_learns_what_ended_while_there_was_none(make_world: MakeWorld) -> None:
    old = await make_world()
    died, ending, unfinished = [await old.spawn() for _ in range(3)]
    await old.sandboxes.stop(keep=True)
    del old.sandboxes.registry._by_id[died.id]  # pyright: ignore[reportPrivateUsage] - it does not see the end
    await old.backend.annotate(ending.id, {**ending.record(), "ending": "ttl_expired"})
    await old.backend.annotate(unfinished.id, {**unfinished.record(), "ready_at": None})
    old.backend.die(died.id, "killed: out of memory")
    for _ in range(2):
        new = await make_world()
        new.sandboxes.recall()
        await new.reconciler.run_once()
        found = {it.id: (it.life.state, it.life.reason) for it in new.sandboxes.registry.all()}
        assert found == {
            died.id: (State.FAILED, EndReason.PROCESS_DIED),
            ending.id: (State.GONE, EndReason.TTL_EXPIRED),
            unfinished.id: (State.FAILED, EndReason.START_FAILED),
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
    old.backend._instances[left.id] = left  # pyright: ignore[reportPrivateUsage]
    new = await make_world()
    new.sandboxes.recall()
    await new.reconciler.run_once()
    assert await new.backend.list() == []
    assert [it.life.reason for it in new.sandboxes.registry.all()] == [EndReason.DESTROYED]
