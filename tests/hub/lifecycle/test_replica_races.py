"""Whatever happens at once on two or three replicas: nothing is lost, nothing is left, one reason, the right one."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ash_hub.lifecycle.record import Record
from ash_hub.lifecycle.sandbox import Sandbox
from ash_mcp.errors import AshError, RunEnded, SandboxGone, SessionTaken
from ash_mcp.types import DEFAULT_SCOPE, EndReason, RunInfo, SandboxId, State
from tests.hub.lifecycle.jump_time import run_in_jump_time
from tests.hub.lifecycle.replica_model import LOCAL, Cluster, Replica

SPAWNS = ("spawn", "short", "idle", "leave", "keyed", "member")
RUN_ACTIONS = ("open", "silence", "end")
ACTIONS = (*SPAWNS, *RUN_ACTIONS, "destroy", "extend", "call", "die", "kill", "stop", "cut", "flush", "wait")
TTL_SECONDS = 20.0
"""Of what is spawned for a short time."""
IDLE_SECONDS = 10.0
LEASE_SECONDS = 8.0
"""Of runs; they are renewed each second while they are held."""
REPORTED_SECONDS = 5.0
"""How long after a call every replica has surely heard of it, as slow as these twins are."""
SPAWN_SECONDS = 150.0
"""No spawn may take longer."""
Action = tuple[str, int, int]
actions = st.lists(
    st.tuples(st.sampled_from((*ACTIONS, "spawn", "destroy")), st.integers(0, 2), st.integers(0, 9)),
    min_size=2,
    max_size=14,
)


@dataclass
class Holder:
    """Who opened a run: a trainer that renews its lease, until it falls silent or ends it."""

    info: RunInfo
    is_silent: bool = False
    is_ended: bool = False
    """Whether it was told that the run is destroyed."""
    is_refused: bool = False
    """Whether a renewal was told that it has ended."""


@dataclass
class Story:
    """What was done to each sandbox, and so what may be true of it in the end."""

    cluster: Cluster
    tasks: anyio.abc.TaskGroup
    made: list[SandboxId] = field(default_factory=list[SandboxId])
    """Those whose spawn was answered."""
    causes: dict[SandboxId, set[EndReason]] = field(default_factory=dict[SandboxId, set[EndReason]])
    """Why a sandbox may have ended."""
    over: set[SandboxId] = field(default_factory=set[SandboxId])
    """Those that must have ended."""
    calls: dict[SandboxId, list[float]] = field(default_factory=dict[SandboxId, list[float]])
    """When each was called, as far as every replica must know of it."""
    keyed: dict[str, set[SandboxId]] = field(default_factory=dict[str, set[SandboxId]])
    """What spawns with one idempotency key were answered with."""
    refused: list[str] = field(default_factory=list[str])
    """Spawns with a key that were told that another has the session: that one has their key, and is theirs."""
    runs: list[Holder] = field(default_factory=list[Holder])
    members: dict[SandboxId, Holder] = field(default_factory=dict[SandboxId, Holder])
    troubles: Counter[str] = field(default_factory=Counter[str])

    def cause(self, sandbox_id: SandboxId, reason: EndReason) -> None:
        self.causes.setdefault(sandbox_id, set()).add(reason)

    async def act(self, name: str, which: int, target: int) -> None:
        replicas = list(self.cluster.living.values())
        replica = replicas[which % len(replicas)]
        sandbox_id = self.made[target % len(self.made)] if self.made else None
        if name in SPAWNS:
            self.tasks.start_soon(self._spawn, replica, name, f"k{target % 2}")
        elif name in RUN_ACTIONS:
            self._act_on_run(name, replica, target)
        elif name in ("cut", "flush", "kill", "stop"):
            self._trouble(name, replica, len(replicas))
        elif sandbox_id is not None and name == "call":
            self.tasks.start_soon(self._call, replica, sandbox_id, target / 3)
        elif sandbox_id is not None and name in ("destroy", "extend"):
            self.tasks.start_soon(self._ask, name, replica, sandbox_id)
        elif sandbox_id is not None and name == "die" and await self.cluster.backend.get(sandbox_id) is not None:
            self.cause(sandbox_id, EndReason.PROCESS_DIED)
            self.over.add(sandbox_id)
            self.cluster.backend.die(sandbox_id)
        await anyio.sleep(target / 4 if name == "wait" else target / 40)

    def _act_on_run(self, name: str, replica: Replica, target: int) -> None:
        if name == "open":
            self.tasks.start_soon(self._hold_run, replica, f"run{len(self.runs)}-{target}")
        elif self.runs:
            holder = self.runs[target % len(self.runs)]
            if name == "silence":
                holder.is_silent = True
            else:
                self.tasks.start_soon(self._end_run, replica, holder)

    async def _hold_run(self, replica: Replica, name: str) -> None:
        """Open a run and renew it through whichever replica lives, as a client behind a balancer does."""
        with replica.alive(), anyio.fail_after(SPAWN_SECONDS):
            try:
                await replica.started.wait()
                info = await replica.sandboxes.runs.open(LOCAL, DEFAULT_SCOPE, name, LEASE_SECONDS)
            except AshError:
                return
            holder = Holder(info)
            self.runs.append(holder)
            self.cluster.tasks.start_soon(self._renew, holder)

    async def _renew(self, holder: Holder) -> None:
        while not (holder.is_silent or holder.is_refused):
            replica = self.cluster.chance.choice(list(self.cluster.living.values()))
            with replica.alive():
                try:
                    runs, info = replica.sandboxes.runs, holder.info
                    await runs.renew(LOCAL, DEFAULT_SCOPE, info.name, info.id, info.lease_seconds)
                except RunEnded:
                    holder.is_refused = True
                except AshError:
                    pass
            await anyio.sleep(1.0)

    async def _end_run(self, replica: Replica, holder: Holder) -> None:
        holder.is_silent = True
        with replica.alive():
            try:
                await replica.sandboxes.destroy_run(LOCAL, DEFAULT_SCOPE, holder.info.id)
                holder.is_ended = True
            except AshError:
                pass

    def _trouble(self, name: str, replica: Replica, replicas: int) -> None:
        self.troubles[name] += 1
        if name == "cut":
            self.cluster.is_away = not self.cluster.is_away
        elif name == "flush" and not self.cluster.is_away:
            self.cluster.flush()
        elif name == "kill" and replicas > 1:
            self.cluster.kill(replica)
            self.cluster.add()
        elif name == "stop" and replicas > 1:
            self.cluster.add()
            self.tasks.start_soon(self._stop, replica)

    async def _stop(self, replica: Replica) -> None:
        for sandbox in replica.sandboxes.registry.living():
            if sandbox.start is not None:  # it may be answered at the same moment
                self.cause(sandbox.id, EndReason.HIVE_STOPPED)
        with replica.alive():
            await replica.sandboxes.stop(keep=False)
        self.cluster.kill(replica)

    async def _spawn(self, replica: Replica, how: str, key: str) -> None:
        asks: dict[str, dict[str, Any]] = {
            "short": {"ttl_seconds": TTL_SECONDS},
            "idle": {"idle_seconds": IDLE_SECONDS},
            "keyed": {"idempotency_key": key, "session": key},
        }
        if how == "keyed":
            self.keyed.setdefault(key, set())
        holder = self.runs[-1] if how == "member" and self.runs else None
        if holder is not None:
            asks["member"] = {"run": holder.info.id}
        came_late = holder is not None and holder.is_ended and not self.troubles["flush"]
        with replica.alive(), anyio.move_on_after(0.6 if how == "leave" else None), anyio.fail_after(SPAWN_SECONDS):
            try:
                sandbox = await replica.spawn(**asks.get(how, {}))
            except AshError as error:
                if isinstance(error, SessionTaken) and not error.retryable:
                    self.refused.append(f"{key}: {error} {error.data}")
                return
            assert not came_late, "a spawn that came late to an ended run was not refused"
            self.made.append(sandbox.id)
            if holder is not None:
                self.members[sandbox.id] = holder
            if how == "keyed":
                self.keyed[key].add(sandbox.id)
            elif how in ("short", "idle"):
                self.cause(sandbox.id, EndReason.TTL_EXPIRED if how == "short" else EndReason.IDLE_EXPIRED)
                self.over.add(sandbox.id)

    async def _call(self, replica: Replica, sandbox_id: SandboxId, seconds: float) -> None:
        with replica.alive():
            sandbox = replica.find(sandbox_id)
            if sandbox is None or sandbox.state is not State.READY:
                return
            call = replica.ledger.begin(sandbox_id, LOCAL.subject)
            await anyio.sleep(seconds)
            replica.ledger.end(call)
            at, troubles = self.cluster.clock(), self.troubles.copy()
            await anyio.sleep(REPORTED_SECONDS)
            if troubles == self.troubles and not self.cluster.is_away and not self.cluster.refilling:
                self.calls.setdefault(sandbox_id, []).append(at)

    async def _ask(self, what: str, replica: Replica, sandbox_id: SandboxId) -> None:
        with replica.alive():
            try:
                await replica.controller.catch_up()
                if (sandbox := replica.find(sandbox_id)) is None:
                    return
                if what == "extend":
                    await replica.sandboxes.extend(LOCAL, DEFAULT_SCOPE, sandbox.id, 600.0)
                    self.over.discard(sandbox_id)  # unless it is ended for another reason
                    return
                self.cause(sandbox_id, EndReason.DESTROYED)
                await replica.sandboxes.destroy([sandbox])
                self.over.add(sandbox_id)
            except AshError:
                pass

    async def check(self) -> None:
        """Compare what is with what was done, when all has come to rest."""
        cluster = self.cluster
        existing = {instance.id for instance in await cluster.backend.list()}
        for sandbox_id in self.made:
            causes = self._causes(sandbox_id)
            if not causes:
                assert sandbox_id in existing, "a sandbox was lost"
            views = [view for replica in cluster.living.values() if (view := replica.find(sandbox_id)) is not None]
            if sandbox_id in existing:
                assert len(views) == len(cluster.living), "a replica does not know of a sandbox"
                assert {view.state for view in views} == {State.READY}
            else:
                reasons = {view.reason for view in views}
                if self.troubles["flush"]:  # the store has why, and who missed the news asks it
                    reasons -= {EndReason.LOST}
                assert len(reasons) <= 1 and reasons <= causes, f"{reasons} where it was {causes}"
                assert len({view.cause for view in views if view.reason in reasons}) <= 1, "two causes of one end"
                self._check_idle(sandbox_id, views)
        assert not self.refused
        assert not self.over & existing, "what must have ended lives"
        self._check_runs(existing)
        routed = {SandboxId(record["sandbox_id"]) for record in await cluster.store.routes()}
        for instance in await cluster.backend.list():
            record = Record.from_json(instance.record)
            was_answered = instance.id in self.made or record.maker not in cluster.living
            assert was_answered and record.ready_at is not None, "something of a spawn that failed is left"
        assert routed == existing, "routes and sandboxes differ"
        assert (await cluster.store.places()).keys() == existing, "places and sandboxes differ"
        assert set(await cluster.store.last_calls()) <= existing
        for replica in cluster.living.values():
            assert replica.routes.ids() == existing
        await self._check_keys(existing)

    def _causes(self, sandbox_id: SandboxId) -> set[EndReason]:
        """Return why a sandbox may have ended: with its run only where nobody renewed that, or it was ended."""
        causes = set(self.causes.get(sandbox_id, ()))
        if (holder := self.members.get(sandbox_id)) is not None and holder.is_silent:
            causes |= {EndReason.RUN_ENDED, EndReason.DESTROYED}
        return causes

    def _check_runs(self, existing: set[SandboxId]) -> None:
        for sandbox_id, holder in self.members.items():
            assert sandbox_id not in existing or not holder.is_silent, "a run that nobody renews has left something"
        for holder in self.runs:
            assert holder.is_silent or not holder.is_refused, "a run that is renewed has ended"

    def _check_idle(self, sandbox_id: SandboxId, views: Sequence[Sandbox]) -> None:
        for view in views:
            ending = view.record.ending
            if ending is not None and ending.reason is EndReason.IDLE_EXPIRED:
                early = ending.at - IDLE_SECONDS
                called = [at for at in self.calls.get(sandbox_id, ()) if early < at < ending.at - REPORTED_SECONDS]
                assert not called, f"it was called at {called} and idle at {ending.at}"

    async def _check_keys(self, existing: set[SandboxId]) -> None:
        """See that a key means one sandbox, and is free where no spawn with it was answered."""
        replica = next(iter(self.cluster.living.values()))
        for key, answered in self.keyed.items():
            assert len(answered & existing) <= 1, "one key, two sandboxes"
            assert len(answered) <= 1 or self.troubles["flush"], "one key, two sandboxes"
            with anyio.fail_after(SPAWN_SECONDS):
                try:
                    assert (await replica.spawn(idempotency_key=key)).id not in answered - existing
                except SandboxGone:
                    assert answered or self.troubles["stop"], "the key of a failed spawn is not free"


async def play(folder: Path, story: Sequence[Action], replicas: int, seed: int) -> None:
    async with anyio.create_task_group() as tasks:
        cluster = Cluster(folder, tasks, seed)
        for _ in range(replicas):
            cluster.add()
        await anyio.sleep(1.0)
        told = Story(cluster, tasks)
        async with anyio.create_task_group() as told.tasks:
            for action in story:
                await told.act(*action)
            cluster.is_away = False
        await cluster.settle()
        await told.check()
        tasks.cancel_scope.cancel()


def check_story(story: Sequence[Action], replicas: int, seed: int) -> None:
    log = logging.getLogger("ash.hub")  # tells at length of each trouble
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run_in_jump_time(lambda: play(Path(folder), story, replicas, seed))
    finally:
        log.setLevel(level)


EXACT = (Phase.explicit, Phase.reuse, Phase.generate)  # what is told by a seed shrinks to nothing
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
RACES = given(story=actions, replicas=st.integers(2, 3), seed=st.integers(0, 2**32))


@settings(max_examples=40, deadline=None, phases=EXACT, suppress_health_check=SLOW)
@RACES
def test_replicas_agree_on_what_lives_and_why_the_rest_ended(story: list[Action], replicas: int, seed: int) -> None:
    check_story(story, replicas, seed)


TOLD: dict[str, list[Action]] = {
    "runs are held, fall silent and are ended": [
        ("open", 0, 9),
        *[("member", n, 3) for n in range(3)],
        ("wait", 0, 9),
        ("silence", 0, 0),
        ("open", 1, 9),
        *[("member", n, 1) for n in range(3)],
        ("end", 1, 1),
        *[("member", n, 2) for n in range(3)],
        *[("wait", 0, 9)] * 6,
    ],
    "the store is emptied and away while runs are held": [
        ("open", 0, 9),
        *[("member", n, 6) for n in range(3)],
        ("wait", 0, 9),
        ("flush", 0, 9),
        *[("wait", 0, 9)] * 6,
        ("member", 0, 9),
        ("cut", 0, 0),
        *[("wait", 0, 9)] * 6,
        ("cut", 0, 0),
        ("kill", 0, 9),
        *[("wait", 0, 9)] * 6,
    ],
    "a holder dies while the store is emptied and a replica killed": [
        ("open", 0, 9),
        *[("member", n, 6) for n in range(3)],
        ("wait", 0, 9),
        ("silence", 0, 0),
        ("member", 0, 0),
        ("flush", 0, 9),
        ("member", 1, 0),
        ("kill", 0, 9),
        *[("wait", 0, 9)] * 6,
    ],
    "spawns come to a replica that has just stopped": [("stop", 0, 0), ("keyed", 0, 8), ("keyed", 0, 8)],
    "many expire": [("short", 0, 3), ("short", 1, 3), ("short", 0, 3), ("short", 1, 3)],
    "one of many idles while the others are called": [
        *[("idle", n, 4) for n in range(3)],
        *[("wait", 0, 4), ("wait", 0, 9)] * 1,
        *[("call", n % 2, 7) for n in range(12) for _ in (0, 1)],
        *[("wait", 0, 9)] * 8,
        *[("call", n % 2, 9) for n in range(8)],
        *[("wait", 0, 9)] * 4,
    ],
    "both end one that dies": [
        *[("spawn", n, 9) for n in range(3)],
        *[("wait", 0, 9)] * 2,
        ("destroy", 0, 0),
        ("destroy", 1, 0),
        ("die", 0, 1),
        ("destroy", 1, 1),
        ("destroy", 0, 2),
        ("extend", 1, 2),
    ],
    "a replica is killed while it starts and ends": [
        *[("spawn", 0, 5) for _ in range(3)],
        ("wait", 0, 9),
        ("spawn", 0, 1),
        ("spawn", 0, 1),
        ("destroy", 0, 0),
        ("kill", 0, 9),
        ("wait", 0, 9),
        ("spawn", 1, 2),
        ("kill", 1, 0),
    ],
    "a replica stops while it starts": [
        ("spawn", 0, 9),
        ("keyed", 0, 2),
        ("spawn", 0, 1),
        ("spawn", 0, 1),
        ("stop", 0, 3),
        ("spawn", 1, 9),
        ("keyed", 1, 2),
        ("wait", 0, 9),
        ("stop", 1, 0),
        ("keyed", 0, 2),
    ],
    "one key for many": [
        *[("keyed", n % 2, 0) for n in range(4)],
        ("wait", 0, 9),
        ("wait", 0, 9),
        *[("keyed", n % 3, 2) for n in range(3)],
        ("destroy", 1, 0),
        ("wait", 0, 9),
        ("keyed", 0, 2),
        ("keyed", 1, 2),
    ],
    "callers leave": [*[("leave", n % 2, n) for n in range(8)], ("keyed", 0, 0), ("kill", 0, 4), ("keyed", 1, 0)],
    "the store is emptied while all goes on": [
        *[("spawn", n, 6) for n in range(3)],
        ("keyed", 0, 1),
        ("wait", 0, 9),
        ("wait", 0, 9),
        ("spawn", 0, 1),
        ("flush", 0, 2),
        ("destroy", 1, 0),
        ("spawn", 1, 3),
        ("idle", 1, 9),
        ("wait", 0, 9),
        ("flush", 0, 9),
        ("keyed", 1, 1),
    ],
    "the answer to the taking of a name is lost": [
        ("keyed", 0, 0),
        ("wait", 0, 2),
        ("cut", 0, 0),
        ("wait", 0, 9),
        ("cut", 0, 0),
        *[("keyed", n % 2, 0) for n in range(12) for _ in (0, 1)],
    ],
    "the store is away while all goes on": [
        *[("spawn", n, 6) for n in range(3)],
        ("short", 0, 9),
        ("idle", 1, 9),
        ("wait", 0, 9),
        ("cut", 0, 0),
        ("spawn", 0, 1),
        ("destroy", 1, 0),
        ("die", 0, 1),
        *[("wait", 0, 9)] * 12,
        ("cut", 0, 0),
        ("call", 0, 4),
        ("wait", 0, 9),
        ("spawn", 1, 1),
    ],
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("story", TOLD.values(), ids=TOLD)
def test_a_told_story_ends_well(story: list[Action], seed: int) -> None:
    check_story(story, 2 + seed % 2, seed)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@settings(max_examples=2000, deadline=None, phases=EXACT, suppress_health_check=SLOW)
@RACES
def test_replicas_agree_in_two_thousand_stories(story: list[Action], replicas: int, seed: int) -> None:
    check_story(story, replicas, seed)
