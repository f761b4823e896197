"""One suite that every backend passes, whoever wrote it.

    @pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
    async def test_backend(behaviour): await behaviour(make)

`make` returns an async context manager whose value is a `BackendUnderTest`, fresh each time.
"""

from __future__ import annotations

import logging
import unittest
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

import anyio

from ash_hub.backends.base import Backend, BackendEvent, Instance, Phase, SnapshotLimits, SnapshotOrder, Snapshots
from ash_hub.testing.document_checks import DOCUMENT_CHECKS
from ash_hub.testing.escapes import (
    ATTEMPTS,
    Attempt,
    Bait,
    Outcome,
    Prison,
    Verdict,
    lay_bait,
    not_made,
    spec_for,
    try_to_escape,
)
from ash_mcp.errors import (
    AshError,
    CapacityExceeded,
    ConfigError,
    Conflict,
    SnapshotNotFound,
    StartFailed,
    Unsupported,
)
from ash_mcp.types import SandboxId, SandboxSpec, new_sandbox_id, new_snapshot_id

__all__ = ["BEHAVIOURS", "BackendUnderTest", "Jail", "Make", "check_backend", "jail", "nothing_escapes"]

_WAIT_SECONDS = 10.0
_MANY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendUnderTest:
    """A backend that was entered, and what the suite needs to know of the world around it."""

    backend: Backend
    spec: SandboxSpec
    """A spec that starts and writes `up` to its log; the suite gives it fresh ids."""
    fail: Callable[[SandboxSpec], SandboxSpec]
    """Makes the next start, of the spec that it returns, fail."""
    die: Callable[[SandboxId], Awaitable[None]]
    """Ends the main process of a sandbox from outside."""
    another: Callable[[], AbstractAsyncContextManager[Backend]]
    """Enters another replica's backend of the same hive."""
    leftovers: Callable[[], Awaitable[Collection[str]]]
    """Names what is left in the world of any sandbox."""
    death_seconds: float = 1.0
    """How soon a death must be told; the platform's own news may take some of it."""
    changes_networks: bool = True
    """Whether the network of a sandbox that runs can be changed."""
    prison: Prison | None = None
    """How to make attempts to escape; None where the backend isolates nothing, and then none is made."""


Make = Callable[[], AbstractAsyncContextManager[BackendUnderTest]]


async def check_backend(make: Make) -> None:
    """Run every behaviour against a backend of its own.

    Raises:
        AssertionError: One of them does not hold.
    """
    for behaviour in BEHAVIOURS:
        try:
            await behaviour(make)
        except unittest.SkipTest as unshown:
            logging.getLogger("ash.testing").warning("%s was not shown: %s", behaviour.__name__, unshown)


def _fresh(under_test: BackendUnderTest) -> SandboxSpec:
    return replace(under_test.spec, id=new_sandbox_id())


async def _started(it: BackendUnderTest, spec: SandboxSpec, backend: Backend | None = None) -> Instance:
    """Create a sandbox and return it once it runs."""
    maker = backend or it.backend
    events = maker.watch()
    created = await maker.create(spec)
    while created.phase is Phase.STARTING:
        created = await _next(events, of=spec.id)
    return created


async def _raises(kind: type[AshError], step: Awaitable[None]) -> None:
    try:
        await step
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


async def _conflicts(step: Awaitable[None]) -> None:
    try:
        await step
    except Conflict:
        return
    raise AssertionError("a record was changed that another had changed, or that is not there")


def _require_changing_networks(it: BackendUnderTest) -> None:
    if not it.changes_networks:
        raise unittest.SkipTest(f"the backend {it.backend.kind} changes no network of a sandbox that runs")


async def a_created_sandbox_runs_and_is_listed(make: Make) -> None:
    async with make() as it:
        spec = replace(_fresh(it), labels={"team": "a"}, record={"owner": "local", "n": [1]})
        created = await _started(it, spec)
        assert created.id == spec.id
        assert created.phase is Phase.RUNNING and created.endpoint is not None and created.exit is None
        assert dict(created.labels) == {"team": "a"} and dict(created.record) == {"owner": "local", "n": [1]}
        assert await it.backend.get(spec.id) == created
        assert await it.backend.list() == [created]
        await it.backend.delete(spec.id)


async def an_id_is_taken_while_its_sandbox_is_known(make: Make) -> None:
    async with make() as it:
        spec = _fresh(it)
        created = await _started(it, spec)
        try:
            await _started(it, spec)
        except Conflict:
            assert await it.backend.get(spec.id) == created
        else:
            raise AssertionError("a second sandbox of the same id was made")
        await it.backend.delete(spec.id)


async def an_unknown_sandbox_is_no_error(make: Make) -> None:
    async with make() as it:
        unknown = new_sandbox_id()
        assert await it.backend.get(unknown) is None
        assert await it.backend.list() == []
        assert await it.backend.logs(unknown) == b""
        await _conflicts(it.backend.annotate(unknown, {"x": 1}, revision=0))
        await it.backend.delete(unknown)
        assert await it.backend.get(unknown) is None


async def annotate_replaces_the_record_and_nothing_else(make: Make) -> None:
    async with make() as it:
        created = await _started(it, replace(_fresh(it), record={"a": 1, "b": 2}))
        await it.backend.annotate(created.id, {"a": 3}, revision=0)
        assert await it.backend.get(created.id) == replace(created, record={"a": 3}, revision=1)
        await it.backend.delete(created.id)


async def annotate_needs_the_newest_revision(make: Make) -> None:
    async with make() as it, it.another() as other:
        created = await _started(it, replace(_fresh(it), record={"a": 1}))
        await other.annotate(created.id, {"a": 2}, revision=0)
        await _conflicts(it.backend.annotate(created.id, {"a": 3}, revision=0))
        assert await it.backend.get(created.id) == replace(created, record={"a": 2}, revision=1)
        await it.backend.annotate(created.id, {"a": 4}, revision=1)
        await it.backend.delete(created.id)
        await _conflicts(it.backend.annotate(created.id, {"a": 5}, revision=2))


async def a_network_is_changed_with_the_record(make: Make) -> None:
    async with make() as it, it.another() as other:
        _require_changing_networks(it)
        events = other.watch()
        created = await _started(it, replace(_fresh(it), network="internet", record={"a": 1}))
        assert await _next(events) == created
        await it.backend.set_network(created.id, ("a.test", "*.b.test"), {"a": 2}, revision=0)
        changed = replace(created, record={"a": 2}, revision=1)
        assert await it.backend.get(created.id) == await _next(events) == changed
        await other.set_network(created.id, "none", {"a": 3}, revision=1)
        await it.backend.set_network(created.id, "internet", {"a": 4}, revision=2)
        assert await it.backend.get(created.id) == replace(created, record={"a": 4}, revision=3)
        await it.backend.delete(created.id)


async def a_network_is_changed_of_the_newest_revision_only(make: Make) -> None:
    async with make() as it, it.another() as other:
        _require_changing_networks(it)
        created = await _started(it, replace(_fresh(it), network="internet"))
        await other.annotate(created.id, {"a": 2}, revision=0)
        await _conflicts(it.backend.set_network(created.id, "none", {"a": 3}, revision=0))
        await _conflicts(it.backend.set_network(new_sandbox_id(), "none", {}, revision=0))
        assert await it.backend.get(created.id) == replace(created, record={"a": 2}, revision=1)
        events = it.backend.watch()
        await it.die(created.id)
        assert (await _next(events)).phase is Phase.ENDED
        await _conflicts(it.backend.set_network(created.id, "none", {"a": 3}, revision=1))
        await it.backend.delete(created.id)
        await _conflicts(it.backend.set_network(created.id, "none", {"a": 3}, revision=1))


async def a_network_that_cannot_be_is_refused_and_changes_nothing(make: Make) -> None:
    async with make() as it:
        _require_changing_networks(it)
        closed = await _started(it, replace(_fresh(it), network="none"))
        await _raises(Unsupported, it.backend.set_network(closed.id, "internet", {"a": 1}, revision=0))
        created = await _started(it, replace(_fresh(it), network="internet"))
        await _raises(ConfigError, it.backend.set_network(created.id, ("*.com",), {"a": 1}, revision=0))
        assert await it.backend.get(closed.id) == closed and await it.backend.get(created.id) == created
        for each in (closed, created):
            await it.backend.delete(each.id)


async def a_changed_record_is_told(make: Make) -> None:
    async with make() as it:
        created = await _started(it, _fresh(it))
        events = it.backend.watch()
        await it.backend.annotate(created.id, {"a": 3}, revision=0)
        assert await _next(events) == replace(created, record={"a": 3}, revision=1)
        await it.backend.delete(created.id)


async def what_another_replica_does_is_seen(make: Make) -> None:
    async with make() as it, it.another() as other:
        events, others = it.backend.watch(), other.watch()
        created = await _started(it, replace(_fresh(it), record={"by": "another"}), other)
        assert await it.backend.list() == [created]
        assert await _next(events) == created
        assert await _next(others) == created
        assert await it.backend.get(created.id) == created
        await it.backend.annotate(created.id, {"by": "this one"}, revision=0)
        changed = replace(created, record={"by": "this one"}, revision=1)
        assert await _next(events) == await _next(others) == await other.get(created.id) == changed
        await other.delete(created.id)
        ended = await _next(events)
        assert (ended.id, ended.phase, ended.record) == (created.id, Phase.ENDED, changed.record)
        assert await it.backend.list() == []
        assert not await it.leftovers()


async def another_replica_may_leave(make: Make) -> None:
    async with make() as it:
        async with it.another() as other:
            created = await _started(it, _fresh(it), other)
        assert await it.backend.list() == [created]
        await it.backend.delete(created.id)


async def delete_leaves_nothing_and_can_be_repeated(make: Make) -> None:
    async with make() as it:
        before = set(await it.leftovers())
        created = await _started(it, _fresh(it))
        await it.backend.delete(created.id)
        await it.backend.delete(created.id)
        assert await it.backend.get(created.id) is None
        assert set(await it.leftovers()) == before


async def watch_reports_start_and_end(make: Make) -> None:
    async with make() as it:
        events = it.backend.watch()
        created = await _started(it, _fresh(it))
        assert (await _next(events)).phase is Phase.RUNNING
        await it.backend.delete(created.id)
        ended = await _next(events)
        assert ended.id == created.id and ended.phase is Phase.ENDED


async def every_watcher_is_told(make: Make) -> None:
    async with make() as it:
        watchers = [it.backend.watch(), it.backend.watch()]
        created = await _started(it, _fresh(it))
        for watcher in watchers:
            assert (await _next(watcher)).id == created.id
        await it.backend.delete(created.id)


async def a_watch_ends_when_the_backend_is_left(make: Make) -> None:
    async with make() as it:
        events = it.backend.watch()
    with anyio.fail_after(_WAIT_SECONDS):
        assert [event async for event in events] == []


async def a_death_is_reported_soon(make: Make) -> None:
    async with make() as it:
        created = await _started(it, _fresh(it))
        events = it.backend.watch()
        await it.die(created.id)
        with anyio.fail_after(it.death_seconds):
            ended = await _next(events)
        assert ended.id == created.id and ended.phase is Phase.ENDED and ended.exit
        assert await it.backend.get(created.id) == ended
        await it.backend.delete(created.id)
        assert await it.backend.get(created.id) is None
        assert not await it.leftovers()


async def the_log_has_what_the_main_process_wrote(make: Make) -> None:
    async with make() as it:
        created = await _started(it, _fresh(it))
        with anyio.fail_after(_WAIT_SECONDS):
            while b"up" not in await it.backend.logs(created.id):  # noqa: ASYNC110 - a log has no event
                await anyio.sleep(0.01)
        assert await it.backend.logs(created.id, tail_bytes=0) == b""
        assert len(await it.backend.logs(created.id, tail_bytes=1)) == 1
        await it.backend.delete(created.id)
        assert await it.backend.logs(created.id) == b""


async def a_failed_start_leaves_nothing(make: Make) -> None:
    async with make() as it:
        neighbour = await _started(it, _fresh(it))
        before = set(await it.leftovers())
        spec = it.fail(_fresh(it))
        try:
            ended = await _started(it, spec)
        except StartFailed as failure:
            assert failure.data["step"]
        else:  # the platform made it, and found out later
            assert ended.phase is Phase.ENDED and ended.exit, "the start did not fail"
            await it.backend.delete(spec.id)
        assert await it.backend.get(spec.id) is None
        assert set(await it.leftovers()) == before
        assert await it.backend.get(neighbour.id) == neighbour
        await it.backend.delete(neighbour.id)
        assert not await it.leftovers()
        created = await _started(it, replace(it.spec, id=spec.id))
        assert created.phase is Phase.RUNNING
        await it.backend.delete(spec.id)


async def a_cancelled_start_leaves_nothing(make: Make) -> None:
    async with make() as it:
        specs = [_fresh(it) for _ in range(3)]
        for spec, seconds in zip(specs, (0.0, 0.002, 0.02), strict=True):
            with anyio.move_on_after(seconds):
                await it.backend.create(spec)
        for spec in specs:
            await it.backend.delete(spec.id)
        assert await it.backend.list() == []
        assert not await it.leftovers()


async def many_start_and_end_at_once(make: Make) -> None:
    async with make() as it:
        specs = [_fresh(it) for _ in range(_MANY)]
        async with anyio.create_task_group() as tasks:
            for spec in specs:
                tasks.start_soon(_started, it, spec)
        listed = await it.backend.list()
        assert {instance.id for instance in listed} == {spec.id for spec in specs}
        assert len({instance.endpoint for instance in listed}) == _MANY
        async with anyio.create_task_group() as tasks:
            for spec in specs:
                tasks.start_soon(it.backend.delete, spec.id)
        assert await it.backend.list() == []
        assert not await it.leftovers()


async def it_describes_itself(make: Make) -> None:
    async with make() as it:
        described = it.backend.describe()
        assert described["kind"] == it.backend.kind
        assert isinstance(described["warnings"], list)


async def documents_are_kept_for_every_replica(make: Make) -> None:
    for check in DOCUMENT_CHECKS:
        async with make() as it, it.another() as other:
            await check(it.backend.documents, other.documents)


def _snapshots_of(it: BackendUnderTest, backend: Backend | None = None) -> Snapshots:
    found = backend or it.backend
    if not isinstance(found, Snapshots) or found.no_snapshots() is not None:
        raise unittest.SkipTest(f"the backend {found.kind} takes no snapshots here")
    return found


def _order(per_owner: int = 8) -> SnapshotOrder:
    limits = SnapshotLimits(per_owner=per_owner, hive=8, owner_bytes=2**30, hive_bytes=2**30)
    return SnapshotOrder(id=new_snapshot_id(), owner="ann", limits=limits, seconds=60.0, record={"of": "ann"})


async def a_sandbox_is_frozen_taken_back_and_begun_from(make: Make) -> None:
    async with make() as it, it.another() as other:
        snapshots, order = _snapshots_of(it), _order()
        spec = replace(_fresh(it), record={"n": 1})
        created = await _started(it, spec)
        taken = await snapshots.freeze(spec.id, order)
        assert (taken.id, taken.owner, taken.record, taken.layers) == (order.id, "ann", {"of": "ann"}, 1)
        assert await it.backend.get(spec.id) == created, "it is the same to whoever looks"
        await snapshots.reset(spec.id, order.id)
        sibling = replace(_fresh(it), snapshot=order.id)
        await _started(it, sibling)
        await it.backend.delete(spec.id, grace_seconds=0)
        seen = await _snapshots_of(it, other).snapshots()
        assert [(found.id, found.size, found.record) for found in seen] == [(order.id, taken.size, taken.record)]
        assert 0 < seen[0].left_seconds <= 60
        for _ in range(2):
            await snapshots.drop_snapshot(order.id)
        assert await snapshots.snapshots() == []
        assert (found := await it.backend.get(sibling.id)) is not None and found.phase is Phase.RUNNING
        await it.backend.delete(sibling.id, grace_seconds=0)


async def what_is_no_snapshot_or_no_sandbox_is_refused(make: Make) -> None:
    async with make() as it:
        snapshots, order, spec = _snapshots_of(it), _order(), _fresh(it)
        await _raises(Conflict, _done(snapshots.freeze(spec.id, order)))
        await _started(it, spec)
        await _raises(CapacityExceeded, _done(snapshots.freeze(spec.id, _order(per_owner=0))))
        await _raises(SnapshotNotFound, snapshots.reset(spec.id, order.id))
        await _raises(SnapshotNotFound, _done(it.backend.create(replace(_fresh(it), snapshot=order.id))))
        assert await snapshots.snapshots() == [] and len(await it.backend.list()) == 1
        await it.backend.delete(spec.id, grace_seconds=0)


async def _done(step: Awaitable[object]) -> None:
    await step


class Jail:
    """Sandboxes to escape from: one for each network policy that attempts need, and a neighbour."""

    def __init__(self, under_test: BackendUnderTest, prison: Prison, bait: Bait, neighbour: Instance) -> None:
        self._under_test = under_test
        self._prison = prison
        self._bait = bait
        self._neighbour = neighbour
        self._shared: dict[str | tuple[str, ...], Instance] = {}

    async def attempt(self, attempt: Attempt) -> Outcome:
        """Make one attempt; one that may end its sandbox, or serves in it, gets a sandbox of its own."""
        if (unmade := not_made(attempt, self._prison)) is not None:
            return unmade
        spec = spec_for(attempt, self._prison, self._bait, _fresh(self._under_test))
        if attempt.fatal or attempt.serves:
            inside = await _started(self._under_test, spec)
            try:
                return await try_to_escape(attempt, self._prison, self._bait, inside, self._neighbour)
            finally:
                await self._under_test.backend.delete(inside.id, grace_seconds=0)
        if spec.network not in self._shared:
            self._shared[spec.network] = await _started(self._under_test, spec)
        inside = self._shared[spec.network]
        return await try_to_escape(attempt, self._prison, self._bait, inside, self._neighbour)


@asynccontextmanager
async def jail(under_test: BackendUnderTest) -> AsyncGenerator[Jail]:
    """Lay bait, start a neighbour with secrets of its own, and give what attempts can be made in.

    Raises:
        unittest.SkipTest: The backend promises no isolation.
    """
    prison = under_test.prison
    if prison is None:
        raise unittest.SkipTest(f"the backend {under_test.backend.kind} isolates nothing")
    with lay_bait() as bait:
        spec = replace(_fresh(under_test), env={"NEIGHBOUR_SECRET": bait.secret})
        neighbour = await _started(under_test, spec)
        notes = "for place in /workspace /home/ash /tmp /dev/shm; do echo neighbour >$place/note; done"
        written = await prison.run(neighbour, ["bash", "-c", notes])
        assert written.code == 0, written.error
        yield Jail(under_test, prison, bait, neighbour)


async def nothing_escapes(make: Make) -> None:
    """Make every attempt of `ash_hub.testing.escapes`, and print what sandboxes share with the host.

    Skipped where the backend promises no isolation.
    """
    async with make() as it, jail(it) as cell:
        outcomes = [await cell.attempt(attempt) for attempt in ATTEMPTS]
        failures = [str(it) for it in outcomes if it.verdict in (Verdict.ESCAPED, Verdict.BROKEN)]
        print(*(it for it in outcomes if it.verdict is Verdict.SHARED), sep="\n")  # noqa: T201 - a report
        assert not failures, "\n".join(failures)
        for instance in await it.backend.list():
            await it.backend.delete(instance.id, grace_seconds=0)


async def _next(events: AsyncIterator[BackendEvent], *, of: SandboxId | None = None) -> Instance:
    """Return the next news of a sandbox, but for those of a start that is under way."""
    with anyio.fail_after(_WAIT_SECONDS):
        while True:
            event = await anext(events)
            assert event.instance is not None and not event.lost
            if event.instance.phase is not Phase.STARTING and of in (None, event.instance.id):
                return event.instance


BEHAVIOURS: tuple[Callable[[Make], Awaitable[None]], ...] = (
    a_created_sandbox_runs_and_is_listed,
    an_id_is_taken_while_its_sandbox_is_known,
    an_unknown_sandbox_is_no_error,
    annotate_replaces_the_record_and_nothing_else,
    annotate_needs_the_newest_revision,
    a_network_is_changed_with_the_record,
    a_network_is_changed_of_the_newest_revision_only,
    a_network_that_cannot_be_is_refused_and_changes_nothing,
    a_changed_record_is_told,
    what_another_replica_does_is_seen,
    another_replica_may_leave,
    delete_leaves_nothing_and_can_be_repeated,
    watch_reports_start_and_end,
    every_watcher_is_told,
    a_watch_ends_when_the_backend_is_left,
    a_death_is_reported_soon,
    the_log_has_what_the_main_process_wrote,
    a_failed_start_leaves_nothing,
    a_cancelled_start_leaves_nothing,
    many_start_and_end_at_once,
    it_describes_itself,
    documents_are_kept_for_every_replica,
    a_sandbox_is_frozen_taken_back_and_begun_from,
    what_is_no_snapshot_or_no_sandbox_is_refused,
    nothing_escapes,
)
"""Each takes `make`, uses fresh backends, and raises AssertionError where a backend breaks its contract."""
