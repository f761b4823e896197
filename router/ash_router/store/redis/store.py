"""The store in Redis. Steps that must be atomic are the scripts beside this file; times are the server's.

Keys, all below one prefix: `routes` (sandbox -> record) with `order`, `changed` and `version`;
`names:<owner, scope>` with `idle` (those that nobody holds a name in), `places` (sandbox -> owner, scope and session)
with `counts` of each owner, `starting` (sandbox -> owner) with `starts` of each owner, `key:<owner, scope, key>`,
`calls`, `tickets:<sandbox>` (hash -> who took it, and the text) with `tickets:<sandbox>:ends` and
`tickets:<sandbox>:taken`, `shelf:<name>` (name -> text) with `shelf:<name>:ends` and `shelf:<name>:bytes`,
`replicas`, `layout` (the version of all this) and `epoch`, which vanishes with them. Without the prefix, as the seed
names them, `sandbox:<alias>`: the hashes by which the seed's gateway finds the sandboxes that its REST spawned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import cache, partial
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import Redis

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import RunId, SandboxId, Scope, SessionName
from ash_router.store.base import (
    CHOSEN_NUMBERS,
    ENDED_RUN_SECONDS,
    ENDED_RUNS,
    IDLE_SCOPE_SECONDS,
    IDLE_SCOPES,
    LAYOUT,
    LOST,
    MAX_REPLICAS,
    NO_PLACE_LIMITS,
    ROUTE_NEWS,
    TAKEN_TICKETS,
    Place,
    PlaceLimits,
    RouteChanges,
    Run,
    RunLease,
    RunLimits,
    RunState,
    Shelf,
    require_layout,
    run_not_open,
    run_taken,
    session_taken,
    tickets_full,
)
from ash_router.store.clock import ServerClock, steady
from ash_router.store.redis.feed import Feed
from ash_router.store.redis.link import Link

__all__ = ["RedisStore"]

CHANGES_REMEMBERED: Final = 10_000
"""Routes that changed last; a reader that knows only an older version gets all routes."""

STARTING_SECONDS: Final = 3600
"""How long the hash of a sandbox that starts is kept, should its hive be killed: longer than any start."""

_MICROSECONDS: Final = 1_000_000
_ALL_TAKEN: Final = 2
"""What `reserve_session.lua` begins with where no place is free."""
_RUN_NOT_OPEN: Final = 3
_RUNS_AT_ONCE: Final = 500
_ALIASES_AT_ONCE: Final = 500
_NUMBERS_AT_ONCE: Final = 500
log = logging.getLogger("ash.store")

Step = Callable[[], Awaitable[Any]]


class RedisStore:
    """A `Store` that replicas share; `open_redis` makes one and keeps it going."""

    def __init__(self, client: Redis, link: Link, feed: Feed, prefix: str) -> None:
        self._client: Any = client
        self._scripts = {name: self._client.register_script(text) for name, text in _texts().items()}
        self._link = link
        self._feed = feed
        self._prefix = prefix
        self._clock = ServerClock()
        self._later: dict[tuple[str, ...], Step] = {}
        """Releases and announcements that could not be sent yet, by subject; `settle` sends them."""
        self._touched: dict[SandboxId, float] = {}
        self._numbers: dict[str, int] = {}
        """The highest session number seen, by Redis key of names, least recently used first. It outlives a flush."""
        self.seed_address: tuple[str, int] | None = None
        """Host and port in the hashes for the seed's gateway; None writes none."""
        self.warned: tuple[str, ...] = ()
        self.restored_epoch = ""
        """The store epoch up to which all names are restored; a later one may lack some that are held."""
        self.refilling = False
        self._layout = ""
        self.restorers: list[Callable[[], Awaitable[None]]] = []

    # -- routes

    async def put_route(self, record: Mapping[str, Any]) -> None:
        sandbox_id = str(record["sandbox_id"])
        self._later.pop(("route", sandbox_id), None)
        text = json.dumps(record, separators=(",", ":"))
        keys = self._keys("routes", "order", "changed", "version", "starting", "starts")
        args = (sandbox_id, text, self._feed.name(ROUTE_NEWS), CHANGES_REMEMBERED)
        shares = record.get("shares", {}).get("version", 0)
        await self._script("put_route", keys, *args, record.get("alias") or "", *self._seed_address(), shares)

    async def drop_route(self, sandbox_id: SandboxId, alias: str | None = None) -> None:
        self._touched.pop(sandbox_id, None)
        keys = [*self._keys("routes", "order", "changed", "version", "calls"), *self._tickets(sandbox_id)]
        args = (sandbox_id, self._feed.name(ROUTE_NEWS), CHANGES_REMEMBERED, alias or "")
        await self._now_or_later(("route", sandbox_id), partial(self._script, "drop_route", keys, *args))

    async def note_starting(self, alias: str) -> None:
        await self._script("seed_starting", [], alias, *self._seed_address(), STARTING_SECONDS)

    async def restore_aliases(self, aliases: Mapping[SandboxId, str]) -> None:
        pairs = [text for pair in aliases.items() for text in pair]
        for at in range(0, len(pairs), 2 * _ALIASES_AT_ONCE):
            some = pairs[at : at + 2 * _ALIASES_AT_ONCE]
            await self._script("seed_missing", self._keys("routes"), *self._seed_address(), *some)

    def _seed_address(self) -> tuple[str, int]:
        return self.seed_address or ("", 0)

    async def routes(self) -> list[Mapping[str, Any]]:
        return list((await self.route_changes(None)).bound)

    async def route_changes(self, since: str | None) -> RouteChanges:
        epoch, _, number = (since or "").partition(":")
        keys = self._keys("routes", "order", "changed", "version", "epoch")
        answer = await self._script("route_changes", keys, epoch, number or 0, CHANGES_REMEMBERED)
        now, version, which, ids, records = answer
        return RouteChanges(
            version=f"{now}:{version}",
            bound=[json.loads(record) for record in records if record is not None],
            unbound=[SandboxId(name) for name, record in zip(ids, records, strict=True) if record is None],
            complete=which != "some",
            refilling=which == "anew",
        )

    # -- names and keys

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
        names = self._owned("names", owner, scope)
        if wanted is not None:
            self._later.pop((names, wanted, sandbox_id), None)
        keys = [names, *self._keys("epoch", "places", "counts", "idle", "starting", "starts", "runs")]
        floor = self._numbers.get(names, 0)
        restored = "" if restoring else self.restored_epoch
        bounds = ["" if restoring or bound is None else bound for bound in (most.owner, most.hive, most.starting)]
        is_restored = "1" if restoring else ""
        args = (
            wanted or "",
            sandbox_id,
            floor,
            restored,
            owner,
            scope,
            *bounds,
            is_restored,
            CHOSEN_NUMBERS,
            run or "",
        )
        given, *more = await self._script("reserve_session", keys, *args)
        _refuse_while_refilling(given)
        if given == _ALL_TAKEN:
            raise most.reached(more[0])
        if given == _RUN_NOT_OPEN and run is not None:
            raise run_not_open(run)
        if not given:
            raise session_taken(wanted, more[0])
        name, number = more
        self._numbers[names] = max(int(number), self._numbers.pop(names, 0))
        if len(self._numbers) > IDLE_SCOPES:
            del self._numbers[next(iter(self._numbers))]
        return SessionName(name)

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        names = self._owned("names", owner, scope)
        keys = [names, *self._keys("places", "counts", "idle", "starting", "starts")]
        args = (session, sandbox_id, IDLE_SCOPES, _micros(IDLE_SCOPE_SECONDS))
        step = partial(self._script, "release_session", keys, *args)
        await self._now_or_later((names, session, sandbox_id), step)

    async def places(self) -> Mapping[SandboxId, Place]:
        kept = await self._link.do(lambda: self._client.hgetall(self._key("places")))
        return {SandboxId(sandbox_id): Place(*json.loads(text)) for sandbox_id, text in kept.items()}

    async def claim_key(
        self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId, *, restoring: bool = False
    ) -> SandboxId:
        name = self._owned("key", owner, scope, key)
        self._later.pop((name, sandbox_id), None)
        restored = "" if restoring else self.restored_epoch
        given, *holder = await self._script("claim_key", [name, self._key("epoch")], sandbox_id, restored)
        _refuse_while_refilling(given)
        return SandboxId(holder[0])

    async def release_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> None:
        name = self._owned("key", owner, scope, key)
        await self._now_or_later((name, sandbox_id), partial(self._script, "release_key", [name], sandbox_id))

    # -- runs

    async def open_run(self, run: Run, *, most: RunLimits, quiet_seconds: float) -> RunLease:
        quiet = _micros(min(quiet_seconds, ENDED_RUN_SECONDS))
        bounds = (most.owner, most.hive, quiet, ENDED_RUNS, _micros(ENDED_RUN_SECONDS))
        keys = [*self._run_keys(), self._key("epoch")]
        given, *more = await self._script("open_run", keys, run.id, _run_text(run), self.restored_epoch, *bounds)
        _refuse_while_refilling(given)
        if given == _ALL_TAKEN:
            raise most.reached(more[0])
        if not given:
            raise run_taken(_read_run(more[1]), int(more[0]) / _MICROSECONDS)
        return _lease(*more)

    async def renew_run(
        self, run_id: RunId, lost: Run | None = None, *, most: RunLimits | None = None, restoring: bool = False
    ) -> RunLease | None:
        bounds = (most.owner, most.hive) if most is not None else ("", "")
        text, restored = "" if lost is None else _run_text(lost), "" if restoring else self.restored_epoch
        keys = [*self._run_keys(), self._key("epoch")]
        given, *more = await self._script("renew_run", keys, run_id, text, restored, *bounds)
        _refuse_while_refilling(given)
        if given == _ALL_TAKEN and most is not None:
            raise most.reached(more[0])
        return _lease(*more) if given else None

    async def judge_runs(self, run_ids: Sequence[RunId], *, quiet_seconds: float) -> Mapping[RunId, RunLease]:
        quiet = _micros(min(quiet_seconds, ENDED_RUN_SECONDS))
        found: dict[RunId, RunLease] = {}
        for first in range(0, max(1, len(run_ids)), _RUNS_AT_ONCE):
            some = run_ids[first : first + _RUNS_AT_ONCE]
            args = (quiet, ENDED_RUNS, _micros(ENDED_RUN_SECONDS), *some)
            said = await self._script("judge_runs", self._run_keys(), *args)
            for index, run_id in enumerate(some):
                state, left, text = said[3 * index : 3 * index + 3]
                if state:
                    found[run_id] = _lease(state, left, text, quiet_seconds=quiet_seconds)
        return found

    async def end_run(self, run_id: RunId) -> None:
        await self._script("end_run", self._run_keys(), run_id)

    async def runs(self) -> list[RunLease]:
        said = await self._script("runs", self._run_keys())
        found = [_lease(RunState.OPEN, left, text) for left, text in zip(said[::2], said[1::2], strict=True)]
        return sorted(found, key=lambda lease: lease.run.opened_at)

    def _run_keys(self) -> list[str]:
        return self._keys("runs", *(f"runs:{part}" for part in ("leases", "names", "counts", "ends", "ended")))

    # -- calls

    async def touch(self, calls: Mapping[SandboxId, float]) -> None:
        for sandbox_id, at in calls.items():
            self._touched[sandbox_id] = max(at, self._touched.get(sandbox_id, at))
        await self._now_or_later(("touch",), self._send_touched)

    async def _send_touched(self) -> None:
        sending = dict(self._touched)
        if sending:
            pairs = [text for sandbox_id, at in sending.items() for text in (sandbox_id, repr(at))]
            await self._script("touch", self._keys("routes", "calls", "epoch"), self.restored_epoch, *pairs)
        for sandbox_id, at in sending.items():
            if self._touched.get(sandbox_id) == at:
                del self._touched[sandbox_id]

    async def prune_calls(self) -> None:
        """Drop the last calls of sandboxes without a route: those that came while the database was filled again."""
        await self._script("touch", self._keys("routes", "calls", "epoch"), self.restored_epoch)

    async def last_calls(self) -> Mapping[SandboxId, float]:
        kept = await self._link.do(lambda: self._client.zrange(self._key("calls"), 0, -1, withscores=True))
        return {SandboxId(name): float(score) for name, score in kept}

    # -- texts

    async def keep(self, shelf: Shelf, name: str, text: str) -> None:
        self._require_near()
        args = (name, text, shelf.most, shelf.most_bytes, _micros(shelf.seconds))
        await self._script("keep", self._shelf(shelf), *args)

    async def kept(self, shelf: Shelf, name: str | None = None) -> Mapping[str, str]:
        self._require_near()
        found = await self._script("kept", self._shelf(shelf), name or "")
        return dict(zip(found[::2], found[1::2], strict=True))

    def _shelf(self, shelf: Shelf) -> list[str]:
        name = f"shelf:{shelf.name}"
        return self._keys(name, f"{name}:ends", f"{name}:bytes")

    def _require_near(self) -> None:
        if self._link.away is not None:
            raise ConnectFailed(f"the hive's store does not answer: {self._link.away}", retry_after_seconds=1.0)

    # -- tickets

    async def put_ticket(
        self, sandbox_id: SandboxId, digest: str, text: str, *, ttl_seconds: float, most: int
    ) -> None:
        args = (digest, text, _micros(ttl_seconds), most, TAKEN_TICKETS)
        if not await self._script("put_ticket", self._tickets(sandbox_id), *args):
            raise tickets_full(most)

    async def take_ticket(self, sandbox_id: SandboxId, digest: str, by: str) -> str | None:
        return await self._script("take_ticket", self._tickets(sandbox_id), digest, by)

    def _tickets(self, sandbox_id: SandboxId) -> list[str]:
        name = f"tickets:{sandbox_id}"
        return self._keys(name, f"{name}:ends", f"{name}:taken")

    # -- replicas

    async def announce_replica(self, replica: str, record: Mapping[str, Any], ttl_seconds: float) -> None:
        self._later.pop(("replica", replica), None)
        text = json.dumps(record, separators=(",", ":"))
        keys = self._keys("replicas")
        await self._script("announce_replica", keys, replica, text, _micros(ttl_seconds), MAX_REPLICAS)

    async def withdraw_replica(self, replica: str) -> None:
        step = partial(self._script, "withdraw_replica", self._keys("replicas"), replica)
        await self._now_or_later(("replica", replica), step)

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        kept = await self._script("replicas", self._keys("replicas"))
        return {name: json.loads(text) for name, text in zip(kept[::2], kept[1::2], strict=True)}

    # -- events

    async def publish(self, channel: str, message: str) -> None:
        # readers whose connection did not break must still learn that they missed a message
        later = partial(self._publish, channel, LOST)
        await self._now_or_later(("news", channel), partial(self._publish, channel, message), later)

    async def _publish(self, channel: str, message: str) -> None:
        name = self._feed.name(channel)
        await self._link.do(lambda: self._client.publish(name, message))

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        return self._feed.subscribe(channel)

    # -- state

    def now(self) -> float:
        return self._clock.now()

    def unready(self) -> str | None:
        if self._link.away is not None:
            return self._link.away
        return "Redis has lost what it held; routes and names are being put back" if self.refilling else None

    def layout(self) -> str:
        return self._layout

    def warnings(self) -> Sequence[str]:
        return self.warned

    def on_flushed(self, restore: Callable[[], Awaitable[None]]) -> None:
        self.restorers.append(restore)

    # -- for the one who keeps it going

    async def current_epoch(self) -> str:
        """Return the epoch of the database, which changes whenever Redis may have lost writes.

        What the server's time is comes with it.

        Raises:
            ConfigError: Another release has laid out the keys in a way that this one does not know.
        """

        async def ask() -> str:
            asked_at = steady()
            found = await self._scripts["epoch"](keys=self._keys("epoch", "layout"), args=[LAYOUT])
            name, layout, seconds, micros = found
            self._clock.learn(int(seconds) + int(micros) / _MICROSECONDS, asked_at, steady())
            self._layout = layout
            return name

        epoch = await self._link.do(ask)
        require_layout(self._layout, f"the keys {self._prefix}:* in Redis at {self._link.shown}")
        return epoch

    async def settle(self) -> None:
        """Send what waits in `_later`.

        Raises:
            ConnectFailed: Redis is away; what is left waits on.
        """
        for about in list(self._later):
            step = self._later.get(about)
            if step is not None:
                await step()
                if self._later.get(about) is step:
                    del self._later[about]

    async def raise_numbers(self) -> None:
        """Restore the highest given session numbers in a database that has lost them."""
        known = list(self._numbers.items())
        for first in range(0, len(known), _NUMBERS_AT_ONCE):
            names, numbers = zip(*known[first : first + _NUMBERS_AT_ONCE], strict=True)
            await self._script("raise_numbers", [self._key("idle"), *names], *numbers)

    async def _now_or_later(self, about: tuple[str, ...], step: Step, later: Step | None = None) -> None:
        """Take a step; if Redis is away keep it, or `later` in its place, for `settle`."""
        if self._link.away is None:
            try:
                await step()
            except ConnectFailed as exc:
                log.info("kept for later", extra={"about": about[0], "why": exc.message})
            else:
                return
        self._later[about] = later or step

    async def _script(self, name: str, keys: Sequence[str], *args: str | int) -> Any:
        script = self._scripts[name]
        return await self._link.do(lambda: script(keys=keys, args=args))

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _keys(self, *names: str) -> list[str]:
        return [self._key(name) for name in names]

    def _owned(self, kind: str, *parts: str) -> str:
        return self._key(f"{kind}:{json.dumps(parts, separators=(',', ':'), ensure_ascii=False)}")


def _refuse_while_refilling(given: int) -> None:
    """Take no new name while the old ones may not be back: two sandboxes would answer to one."""
    if given == -1:
        raise ConnectFailed(
            "the hive's store has lost what it held and is being filled again; try again in a moment",
            retry_after_seconds=1.0,
        )


def _run_text(run: Run) -> str:
    return json.dumps(run.to_json(), separators=(",", ":"))


def _read_run(text: str) -> Run:
    return Run.from_json(json.loads(text))


def _lease(state: str, left: str, text: str, *, quiet_seconds: float | None = None) -> RunLease:
    run, seconds = _read_run(text), int(left) / _MICROSECONDS
    if state == RunState.OPEN and quiet_seconds is not None:
        seconds = max(seconds, run.lease_seconds - quiet_seconds)
    return RunLease(run, RunState(state), seconds)


def _micros(seconds: float) -> int:
    return round(seconds * _MICROSECONDS)


@cache
def _texts() -> Mapping[str, str]:
    folder = files("ash_router.store.redis") / "scripts"
    texts = {file.name.removesuffix(".lua"): file.read_text() for file in folder.iterdir()}
    prelude = texts.pop("prelude")
    return {name: prelude + text for name, text in texts.items()}
