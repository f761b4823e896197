"""What the backend knows of its pods, whatever order answers and news come in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ash_hub.backends.base import BackendEvent, Exit, Phase
from ash_hub.backends.kubernetes.api import ApiRefusal, Json
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_mcp.errors import CapacityExceeded, Conflict, ConnectFailed, StartFailed
from ash_mcp.types import Cause, SandboxId, SandboxSpec, new_sandbox_id
from tests.hub.backends.kubernetes.pod_server import PodServer, following

pytestmark = pytest.mark.anyio

SPEC = SandboxSpec(id=SandboxId("sbx-unused"), recipe="r", server={"python": "none:none"}, key="k")
RUNNING: Json = {
    "phase": "Running",
    "podIP": "10.0.0.1",
    "containerStatuses": [{"name": "sandbox", "state": {"running": {}}}],
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def fresh() -> SandboxSpec:
    return replace(SPEC, id=new_sandbox_id())


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


async def settled(server: PodServer) -> None:
    """Let all that is on its way arrive."""
    version = -1
    while version != server.version:
        version = server.version
        await asyncio.sleep(0.02)


async def heard(backend: KubernetesBackend, told: list[BackendEvent]) -> None:
    events = backend.watch()
    while True:
        told.append(await anext(events))


async def test_an_answer_that_is_slower_than_the_news_of_the_end_makes_no_ghost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        server.held = asyncio.Event()
        creating = asyncio.create_task(backend.create(spec))
        await until(lambda: spec.id in server.pods)
        server.take(spec.id)
        await settled(server)
        server.held.set()
        with pytest.raises(StartFailed, match="deleted as soon as it was made"):
            await creating
        assert await backend.get(spec.id) is None


async def test_an_answer_that_is_slower_than_a_new_list_makes_no_ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        server.held, server.deaf = asyncio.Event(), asyncio.Event()
        creating = asyncio.create_task(backend.create(spec))
        await until(lambda: spec.id in server.pods)
        server.take(spec.id)
        server.forget_history()
        server.deaf.set()
        await until(lambda: backend._news.heard_to == server.version)  # pyright: ignore[reportPrivateUsage]
        server.held.set()
        with pytest.raises(StartFailed, match="deleted as soon as it was made"):
            await creating
        assert await backend.get(spec.id) is None


async def test_a_change_that_is_answered_after_the_end_makes_no_ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        await backend.create(spec)
        server.held = asyncio.Event()
        changing = asyncio.create_task(backend.annotate(spec.id, {"a": 1}, revision=0))
        await until(lambda: server.pods[spec.id]["metadata"]["annotations"]["ash/revision"] == "1")
        server.take(spec.id)
        await settled(server)
        server.held.set()
        await changing
        assert await backend.get(spec.id) is None


async def test_what_has_come_too_late_for_a_list_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PodServer()
    async with following(server, monkeypatch) as backend:
        for _ in range(20):
            server.forget_history()
            spec = fresh()
            await backend.create(spec)
            await asyncio.sleep(0)
            assert await backend.get(spec.id) is not None
        await settled(server)
        assert {each.id for each in await backend.list()} == set(server.pods)


async def test_who_loses_against_an_end_that_is_not_told_yet_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        await backend.create(spec)
        await settled(server)
        told: list[BackendEvent] = []
        listening = asyncio.create_task(heard(backend, told))
        server.deaf = asyncio.Event()
        server.event(spec.id, "Poke", "so that the watch looks at whether it may speak")
        await settled(server)
        server.change(spec.id, RUNNING)
        server.take(spec.id)
        with pytest.raises(Conflict):
            await backend.annotate(spec.id, {}, revision=0)
        assert await backend.get(spec.id) is None
        server.deaf.set()  # now what it was before comes, too late
        await settled(server)
        assert await backend.get(spec.id) is None
        assert [each.instance and each.instance.phase for each in told] == [Phase.ENDED]
        listening.cancel()


async def test_a_pod_that_takes_the_name_of_another_is_not_its_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        await backend.create(spec)
        server.change(spec.id, RUNNING)
        await settled(server)
        copied = server.pods[spec.id]["metadata"]
        server.deaf = asyncio.Event()
        server.event(spec.id, "Poke", "so that the watch looks at whether it may speak")
        await settled(server)
        server.take(spec.id)
        server.put(spec.id, copied["labels"], annotations=copied["annotations"])
        server.change(spec.id, RUNNING)
        server.forget_history()  # so that its end is never told
        server.deaf.set()
        await until(lambda: backend._pods[spec.id].uid == server.pods[spec.id]["metadata"]["uid"])  # pyright: ignore[reportPrivateUsage]
        seen = await backend.get(spec.id)
        assert seen is not None and seen.phase is Phase.ENDED
        assert seen.exit == Exit("its pod was replaced by another of the same name", Cause.OPERATOR)
        server.change(spec.id, RUNNING)
        await settled(server)
        assert await backend.get(spec.id) == seen


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("plain", {}),
        ("alike", {"ash/hive": "h"}),
        ("copied", {"ash/hive": "h", "ash/sandbox": "sbx-original"}),
        ("anothers", {"ash/hive": "other", "ash/sandbox": "anothers"}),
    ],
)
async def test_a_pod_that_the_hive_did_not_make_is_neither_seen_nor_deleted(
    name: str, labels: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = PodServer()
    server.put(name, labels)
    async with following(server, monkeypatch) as backend:
        server.put("made-later", labels)
        await settled(server)
        assert await backend.list() == []
        for each in (name, "made-later"):
            assert await backend.get(SandboxId(each)) is None
            await backend.delete(SandboxId(each))
        assert set(server.pods) == {name, "made-later"}


async def test_a_pod_whose_label_is_taken_away_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        await backend.create(spec)
        await settled(server)
        server.pods[spec.id]["metadata"]["labels"]["ash/sandbox"] = "nothing"
        server.change(spec.id, RUNNING)
        await settled(server)
        assert await backend.get(spec.id) is None
        await backend.delete(spec.id)
        assert spec.id in server.pods


async def test_a_start_whose_answer_is_lost_leaves_no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PodServer()
    async with following(server, monkeypatch) as backend:
        for turns in range(8):  # the news comes before the answer, or after
            spec = fresh()
            server.lost_answers = 1
            with pytest.raises(StartFailed, match="does not answer") as failure:
                await backend.create(spec)
            assert failure.value.retryable
            for _ in range(turns):
                await asyncio.sleep(0)
        await until(lambda: not server.pods)


async def test_a_start_that_is_given_up_while_the_api_goes_away_leaves_no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash_hub.backends.kubernetes.backend._CLEAN_UP_SECONDS", 0.5)
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        server.held = asyncio.Event()
        creating = asyncio.create_task(backend.create(spec))
        await until(lambda: spec.id in server.pods)
        server.go_away()
        creating.cancel()
        await asyncio.sleep(0.05)
        server.is_away = False
        with pytest.raises(asyncio.CancelledError):
            await creating
        server.held.set()
        await until(lambda: not server.pods)


async def test_another_creation_that_changes_the_quota_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = ApiRefusal(409, {"reason": "Conflict", "message": "cannot be fulfilled on resourcequotas: changed"})
    server = PodServer()
    async with following(server, monkeypatch) as backend:
        server.refusals = [changed, changed]
        await backend.create(fresh())
        server.refusals = [changed] * 9
        with pytest.raises(CapacityExceeded, match="changes all the time"):
            await backend.create(fresh())


async def test_the_newest_words_of_the_cluster_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    server, spec = PodServer(), fresh()
    async with following(server, monkeypatch) as backend:
        await backend.create(spec)
        await settled(server)
        for reason in ("FailedMount", "FailedCreatePodSandBox"):
            server.event(spec.id, reason, "no")
            await settled(server)
            seen = await backend.get(spec.id)
            assert seen is not None and seen.waits_for == f"{reason}: no"


async def test_while_the_api_is_away_what_is_known_stays_and_nothing_is_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, spec, kept = PodServer(), fresh(), fresh()
    async with following(server, monkeypatch) as backend:
        for each in (spec, kept):
            await backend.create(each)
            server.change(each.id, RUNNING)
        await settled(server)
        server.go_away()
        await until(backend.unready)
        known = await backend.get(spec.id)
        assert known is not None and known.phase is Phase.RUNNING
        for step in (backend.list(), backend.get(new_sandbox_id()), backend.delete(spec.id)):
            with pytest.raises(ConnectFailed, match="does not answer"):
                await step
        told: list[BackendEvent] = []
        listening = asyncio.create_task(heard(backend, told))
        server.pods.pop(spec.id)
        server.forget_history()
        server.is_away = False
        await until(lambda: backend.unready() is None)
        await until(lambda: len(told) == 2)
        ended, again = (event.instance for event in told)
        assert ended is not None and (ended.id, ended.exit) == (spec.id, Exit("its pod is gone", Cause.OPERATOR))
        # what could not be done meanwhile is to be tried at once
        assert again is not None and (again.id, again.phase) == (kept.id, Phase.RUNNING)
        listening.cancel()


@pytest.mark.parametrize("seed", range(40))
async def test_in_any_order_what_is_known_is_what_there_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, server = random.Random(seed), PodServer(seed)
    asked: list[SandboxId] = []
    given_up: list[SandboxId] = []
    server.put("theirs", {"ash/hive": "other", "ash/sandbox": "theirs"})

    async def live(backend: KubernetesBackend) -> None:
        spec = fresh()
        asked.append(spec.id)
        creating = asyncio.create_task(backend.create(spec))
        if chance.random() < 0.3:
            for _ in range(chance.randint(0, 12)):
                await asyncio.sleep(0)
            creating.cancel()
        try:
            await creating
        except (asyncio.CancelledError, StartFailed):
            given_up.append(spec.id)
            return
        for _ in range(chance.randint(0, 4)):
            try:
                await chance.choice(steps)(backend, spec.id)
            except Conflict:
                pass

    async def annotate(backend: KubernetesBackend, sandbox_id: SandboxId) -> None:
        await backend.annotate(sandbox_id, {}, revision=0)

    async def delete(backend: KubernetesBackend, sandbox_id: SandboxId) -> None:
        await backend.delete(sandbox_id)
        assert await backend.get(sandbox_id) is None and sandbox_id not in server.pods

    async def by_hand(backend: KubernetesBackend, sandbox_id: SandboxId) -> None:
        server.take(sandbox_id)

    async def report(backend: KubernetesBackend, sandbox_id: SandboxId) -> None:
        server.change(sandbox_id, RUNNING)

    async def list_again(backend: KubernetesBackend, sandbox_id: SandboxId) -> None:
        server.forget_history()

    steps = [annotate, delete, by_hand, report, list_again]
    async with following(server, monkeypatch) as backend:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(live(backend))
        await until(lambda: not set(given_up) & set(server.pods))
        server.put("last", {})
        await until(lambda: backend._news.heard_to == server.version)  # pyright: ignore[reportPrivateUsage]
        for sandbox_id in asked:
            seen = await backend.get(sandbox_id)
            there = server.pods.get(sandbox_id)
            assert (seen is None) == (there is None), sandbox_id
            if seen is not None and there is not None:
                assert (seen.phase is Phase.RUNNING) == ("status" in there)
        assert "theirs" in server.pods
