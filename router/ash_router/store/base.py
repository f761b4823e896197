"""The store interface: state that the replicas of a hive share. It may be lost at any time, and is then rebuilt.

It is *not* the truth about which sandboxes exist; the backend is. Every step that two replicas could take at the same
time is one atomic call, so no caller reads first and writes later. `memory.py` implements it for one process;
`ash_router.store.testing.check_store` is the test suite that every implementation passes.

Every call may be repeated after a failure, whether or not the first one was done. A shared store can be away. Calls
that read or take something then raise `ConnectFailed` (retryable) after a bounded wait. Calls that only release or
announce (`drop_route`, `release…`, `touch`, `publish`) do not fail: they are done when the store is back, so
that the end of a sandbox never waits for the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol

from ash_mcp.errors import CapacityExceeded, ConfigError, RunEnded, RunTaken, SessionTaken
from ash_mcp.types import Endpoint, RunId, SandboxId, Scope, SessionName
from ash_router.bounds.effective_limits import EffectiveLimit

__all__ = [
    "CHOSEN_NUMBERS",
    "ENDED_RUNS",
    "ENDED_RUN_SECONDS",
    "IDLE_SCOPES",
    "IDLE_SCOPE_SECONDS",
    "LAYOUT",
    "LOST",
    "MAX_REPLICAS",
    "NO_PLACE_LIMITS",
    "ROUTE_NEWS",
    "TAKEN_TICKETS",
    "Place",
    "PlaceLimits",
    "RouteChanges",
    "Run",
    "RunLease",
    "RunLimits",
    "RunState",
    "SeedAddress",
    "SeedRoutes",
    "Shelf",
    "Store",
    "require_layout",
    "run_not_open",
    "run_taken",
    "session_taken",
    "tickets_full",
]

LAYOUT: Final = "1"
"""The version of what a shared store's keys mean. Releases that know the same one may share a store, so a rolling
upgrade works between them; another one is refused when the store is opened. Grows when an older release would misread
what a newer one writes, or the other way round; not with a key or a field that older releases leave alone.
"""

LOST: Final = ""
"""What a subscription yields where messages may have been missed: the reader must read everything again."""

MAX_REPLICAS: Final = 1000
"""The most replicas that are kept; beyond it those that expire first are dropped."""

IDLE_SCOPES: Final = 2000
"""The most scopes without a sandbox whose session numbers are remembered; the longest idle go first."""

IDLE_SCOPE_SECONDS: Final = 86_400.0
"""How long those numbers are remembered at most."""

CHOSEN_NUMBERS: Final = 100
"""Names like `sb7` that callers chose ahead of the count, remembered for each scope; over it the count goes on behind
the lower half of them."""

ENDED_RUNS: Final = 10_000
"""The most ended runs that are remembered, so that what comes late for one is refused; the first to end go first."""

ENDED_RUN_SECONDS: Final = 86_400.0
"""How long they are remembered at most."""

TAKEN_TICKETS: Final = 64
"""The most tickets of a sandbox that are remembered after they were taken, so that taking one may be repeated."""

ROUTE_NEWS: Final = "routes"
"""The channel on which `put_route` and `drop_route` name the sandbox whose route changed, in the same step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteChanges:
    """How the routes changed since a version that the caller knows."""

    version: str
    """Opaque; pass it to the next `route_changes`."""
    bound: Sequence[Mapping[str, Any]]
    unbound: Sequence[SandboxId] = ()
    complete: bool = False
    """Whether `bound` holds all routes, so that any other is gone."""
    refilling: bool = False
    """Only with `complete`: the store has lost its content, so a route that it lacks may still be good."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """A bounded cache of texts by name, which expire; the oldest make room for new ones."""

    name: str
    most: int
    """The most texts."""
    most_bytes: int
    """The most bytes of all texts together."""
    seconds: float
    """How long a text is kept."""


class SeedAddress(NamedTuple):
    """Where the seed's gateway reaches a process of the hive."""

    host: str | None
    """A literal address, an IPv6 one in brackets; None is the one by which Redis sees the process. Never a name: the
    seed's control plane deletes the Service and the Deployment that the first two labels of a name spell."""
    port: int


class Place(NamedTuple):
    """A living sandbox's place in the limits: its owner, scope and first session name."""

    owner: str
    scope: Scope
    session: SessionName


@dataclass(frozen=True, slots=True)
class PlaceLimits:
    """The most places, of an owner and of the hive. None: no limit."""

    owner: int | None = None
    """Of this owner."""
    starting: int | None = None
    """Of this owner, for sandboxes that have had no route yet."""
    hive: int | None = None
    """Of all owners."""
    owner_by_key: bool = False
    """Whether `owner` is the limit of the principal's key, and not the hive's."""
    starting_by_key: bool = False

    def reached(self, which: str) -> CapacityExceeded:
        """Return the refusal of one more sandbox; `which` limit was reached: `owner`, `starting` or `hive`.

        Its `data["limit"]` says whose limit it was: `key`, `owner` or `hive`.
        """
        if which == "owner" and self.owner is not None:
            return EffectiveLimit(self.owner, self.owner_by_key).reached("sandboxes")
        if which == "starting" and self.starting is not None:
            return EffectiveLimit(self.starting, self.starting_by_key).reached("starting")
        said = f"this hive holds {self.hive} sandboxes, its limit; destroy one, come back later"
        message = f"{said}, or have the limit raised (ASH_HUB_LIMITS__SANDBOXES)"
        return CapacityExceeded(message, limit="hive", retry_after_seconds=10.0)


NO_PLACE_LIMITS: Final = PlaceLimits()


def require_layout(found: str, where: str) -> None:
    """Refuse a store whose layout this release does not know.

    Raises:
        ConfigError: The message says what to do.
    """
    if found != LAYOUT:
        raise ConfigError(
            f"{where} have layout {found[:32]!r}, and this release knows only {LAYOUT!r}. Run the release that wrote "
            "them, or give this hive another prefix (ASH_HUB_REDIS_PREFIX). Or stop every replica and delete these "
            "keys: the next one fills the store again, and only why sandboxes ended is lost"
        )


def tickets_full(most: int) -> CapacityExceeded:
    """Return the refusal of one more ticket for a sandbox."""
    message = f"this sandbox has {most} tickets that are not used yet, as many as it may; use them, or let them expire"
    return CapacityExceeded(message, limit="hive", retry_after_seconds=10.0)


class RunState(StrEnum):
    """How a run stands. An ended one never opens again."""

    OPEN = "open"
    OVER = "over"
    """Its lease was not renewed."""
    DESTROYED = "destroyed"
    """Its owner ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One opening of a run: what never changes of it."""

    id: RunId
    owner: str
    scope: Scope
    name: str
    """Of one open run of this owner and scope at a time."""
    lease_seconds: float
    key: str | None = None
    """The idempotency key of its opening."""
    opened_at: float = 0.0
    """In seconds since the epoch."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Run:
        key = found["key"]
        return cls(
            id=RunId(str(found["id"])),
            owner=str(found["owner"]),
            scope=Scope(str(found["scope"])),
            name=str(found["name"]),
            lease_seconds=float(found["lease_seconds"]),
            key=str(key) if isinstance(key, str) else None,
            opened_at=float(found["opened_at"]),
        )


@dataclass(frozen=True, slots=True)
class RunLease:
    """A run, and how it stands."""

    run: Run
    state: RunState
    left_seconds: float = 0.0
    """Until its lease is over; it may be over by now although nobody has judged so."""


@dataclass(frozen=True, slots=True)
class RunLimits:
    """The most open runs, of an owner and of the hive."""

    owner: int
    hive: int
    owner_by_key: bool = False
    """Whether the owner's key sets its limit."""

    def reached(self, which: str) -> CapacityExceeded:
        """Return the refusal of one more; `which` limit was reached: `owner` or `hive`."""
        if which == "owner":
            return EffectiveLimit(self.owner, by_key=self.owner_by_key).reached("runs")
        said = f"this hive has {self.hive} open runs, its limit; end one, come back later"
        message = f"{said}, or have the limit raised (ASH_HUB_LIMITS__RUNS)"
        return CapacityExceeded(message, limit="hive", retry_after_seconds=10.0)


def run_not_open(run_id: RunId) -> RunEnded:
    """Return the refusal of a place in a run that is not open."""
    return RunEnded("the run has ended: nothing can be spawned in it any more; open another one", run_id=run_id)


def run_taken(run: Run, left_seconds: float) -> RunTaken:
    """Return the refusal of a run whose name an open run has."""
    left = max(0.0, left_seconds)
    return RunTaken(
        f"a run {run.name!r} of yours is open, and ends in {left:.0f} s unless it is renewed: join it, destroy it, "
        "wait, or take another name",
        run=run.name,
        left_seconds=round(left, 3),
    )


def session_taken(session: SessionName | None, holder: str) -> SessionTaken:
    """Return the refusal of a session name that another sandbox has."""
    return SessionTaken(f"session {session} is in use; choose another name, or none to be given one", holder=holder)


class SeedRoutes(Protocol):
    """Where the seed's control plane says that its sandboxes are."""

    async def find(self, uuid: str) -> Endpoint | None:
        """Return where the sandbox of that uuid listens; None if there is none.

        Raises:
            AshError: That could not be found out.
        """
        ...

    async def unready(self) -> str | None:
        """Return why none can be found now, in the words of the seed's gateway, or None."""
        ...


class Store(Protocol):
    """Routes, names, keys, last calls, texts and events, shared by the replicas of one hive."""

    async def put_route(self, record: Mapping[str, Any]) -> None:
        """Store a route under its `sandbox_id`; from then on the sandbox is not counted as starting.

        One whose shares are of an earlier version than those that are stored is not kept: it is another replica's
        older news, and would give back what was revoked.
        """
        ...

    async def drop_route(self, sandbox_id: SandboxId, alias: str | None = None) -> None:
        """Remove a route, and with it when its sandbox was last called; idempotent.

        Args:
            alias: The sandbox's, where its route may never have been stored: what `note_starting` wrote goes, too.
        """
        ...

    async def note_starting(self, alias: str) -> None:
        """Let the seed's gateway find a sandbox that has no route yet; no-op where it finds it already."""
        ...

    async def restore_aliases(self, aliases: Mapping[SandboxId, str]) -> None:
        """Let the seed's gateway find the sandboxes again that have a route and that it does not find any more."""
        ...

    async def routes(self) -> list[Mapping[str, Any]]:
        """Return every stored route, in the order in which they were first put."""
        ...

    async def route_changes(self, since: str | None) -> RouteChanges:
        """Return how the routes differ from what they were at version `since`; all of them for None."""
        ...

    async def reserve_session(
        self,
        owner: str,
        scope: Scope,
        wanted: SessionName | None,
        sandbox_id: SandboxId,
        *,
        most: PlaceLimits = NO_PLACE_LIMITS,
        restoring: bool = False,
        run: RunId | None = None,
    ) -> SessionName:
        """Give a session name to a sandbox, and with its first name a place among the living, in one step.

        Args:
            wanted: The caller's choice; None takes the next of `sb1`, `sb2`, … that nobody holds. A number is not
                given again, so that a name in a model's memory never means another sandbox, until the scope was
                without a sandbox for `IDLE_SCOPE_SECONDS`, or for longer than `IDLE_SCOPES` others.
                A sandbox that holds a name already gets that one again.
            most: How many places there are. A place counts as starting until its sandbox has a route.
            run: Where it is spawned in a run, that one, which must be open.
            restoring: The sandbox held it already when the store lost it, so no limit holds. No other name is given
                before all may be back: that fails as if the store were away.

        Raises:
            SessionTaken: `wanted` belongs to another sandbox of this owner and scope; `data["holder"]` says which.
            RunEnded: The run is not open.
            CapacityExceeded: All places are taken; `data["limit"]` says whose limit that is, `key`, `owner` or `hive`.
        """
        ...

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        """Let a name go if `sandbox_id` holds it, and the sandbox's place with it; idempotent."""
        ...

    async def places(self) -> Mapping[SandboxId, Place]:
        """Return every place that is taken, and by which sandbox."""
        ...

    async def claim_key(
        self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId, *, restoring: bool = False
    ) -> SandboxId:
        """Bind an idempotency key to a sandbox and return the sandbox that it is bound to, the first one to come.

        Args:
            restoring: As with `reserve_session`.
        """
        ...

    async def release_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> None:
        """Unbind a key if `sandbox_id` holds it; idempotent."""
        ...

    async def open_run(self, run: Run, *, most: RunLimits, quiet_seconds: float) -> RunLease:
        """Open a run, its lease counting from now, once the runs whose leases are over have ended.

        Args:
            run: Where an open run has its name and was opened with the same key, that one is renewed and returned.
            quiet_seconds: As with `judge_runs`.

        Raises:
            RunTaken: An open run has its name.
            CapacityExceeded: There are as many as may be; `data["limit"]` says whose limit that is.
        """
        ...

    async def renew_run(
        self, run_id: RunId, lost: Run | None = None, *, most: RunLimits | None = None, restoring: bool = False
    ) -> RunLease | None:
        """Restart the lease of an open run, and say how it stands; None where nothing is known of it.

        Args:
            lost: What to put back where nothing is known of it, as after a flush; its lease restarts. Where
                another open run has got its name, both are open, and this one is reached by its id.
            most: The limits, for what is put back.
            restoring: What is there is not renewed.

        While the store is being filled again, a run without `lost` that it does not know fails as if it were away.

        Raises:
            CapacityExceeded: `lost` would be one too many.
        """
        ...

    async def judge_runs(self, run_ids: Sequence[RunId], *, quiet_seconds: float) -> Mapping[RunId, RunLease]:
        """End the runs whose leases are over, of all owners, and say how these stand; unknown ones are left out.

        Args:
            quiet_seconds: For how long renewals have surely reached the store: no lease counts from before that.
        """
        ...

    async def end_run(self, run_id: RunId) -> None:
        """End a run for its owner; idempotent."""
        ...

    async def runs(self) -> list[RunLease]:
        """Return the open runs of all owners, in the order in which they were opened."""
        ...

    async def touch(self, calls: Mapping[SandboxId, float]) -> None:
        """Record when sandboxes were last called, in seconds since the epoch; never backwards.

        One without a route is passed over: its last call ended after it did, and nobody would remove the record.
        """
        ...

    async def last_calls(self) -> Mapping[SandboxId, float]:
        """Return when each touched sandbox was last called."""
        ...

    async def keep(self, shelf: Shelf, name: str, text: str) -> None:
        """Keep a text for a while; what was kept first under a name stays. One larger than its shelf is not kept.

        Raises:
            ConnectFailed: At once where the store is known to be away, so that no end of a sandbox has to wait.
        """
        ...

    async def kept(self, shelf: Shelf, name: str | None = None) -> Mapping[str, str]:
        """Return the texts of a shelf, or the one of this name, by name; the oldest first.

        Raises:
            ConnectFailed: As `keep` does.
        """
        ...

    async def put_ticket(
        self, sandbox_id: SandboxId, digest: str, text: str, *, ttl_seconds: float, most: int
    ) -> None:
        """Keep a ticket for a sandbox by its hash until it is used, or its time is over, or the sandbox has ended.

        Raises:
            CapacityExceeded: The sandbox has `most` already.
        """
        ...

    async def take_ticket(self, sandbox_id: SandboxId, digest: str, by: str) -> str | None:
        """Return the text of a ticket to the first who takes it; None to everybody else.

        Args:
            by: Whoever takes it, unique; so that the step may be repeated.
        """
        ...

    async def announce_replica(self, replica: str, record: Mapping[str, Any], ttl_seconds: float) -> None:
        """Say that a replica of the hive lives for so long from now, and what it says of itself.

        An emptied store knows of none; each says so again before its time is over, and what is over is removed.
        """
        ...

    async def withdraw_replica(self, replica: str) -> None:
        """Take back that a replica lives; idempotent."""
        ...

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what each replica that lives, by the store's clock, says of itself."""
        ...

    async def publish(self, channel: str, message: str) -> None:
        """Send a message to whoever subscribes to the channel now, on every replica."""
        ...

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        """Receive what is published from the moment the context is entered.

        A reader that falls 1,000 messages behind loses the oldest, and a connection can break; every message must
        therefore be a hint to look again and never the only carrier of a fact. Where some may be missing the reader
        gets `LOST`, before those that came after.
        """
        ...

    def now(self) -> float:
        """Return the store's time, in seconds since the epoch, without waiting; the same for all who share it.

        They may differ by the time that an answer of the store takes; setting the clock of their machines changes
        nothing.
        """
        ...

    def layout(self) -> str:
        """Return the version of the layout of what the store holds, as it was last read: `LAYOUT`."""
        ...

    def unready(self) -> str | None:
        """Return why the store cannot be used now, or None."""
        ...

    def warnings(self) -> Sequence[str]:
        """Return warnings about the store's configuration for the operator, a sentence each."""
        ...

    def on_flushed(self, restore: Callable[[], Awaitable[None]]) -> None:
        """Have `restore` called when the store lost what it held, or may have; again while it raises `AshError`.

        It puts back what is true and drops what is not; several replicas do so at once.
        """
        ...
