"""The store in Redis. Steps that must be atomic are the scripts beside this file; times are the server's.

Keys, all below one prefix: `routes` (sandbox -> generation and record) with `order`, `changed` and `version`;
`names:<owner, scope>`, `key:<owner, scope, key>`, `lease:<name>`, `calls`, `replicas`, and `epoch`,
which vanishes with them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import cache, partial
from importlib.resources import files
from typing import Any, Final

from redis.asyncio import Redis

from ash_mcp.errors import ConnectFailed, LeaseHeld, LeaseLost, SessionTaken
from ash_mcp.types import SandboxId, Scope, SessionName
from ash_router.store.base import LOST, MAX_REPLICAS, ROUTE_NEWS, Lease, RouteChanges
from ash_router.store.redis.feed import Feed
from ash_router.store.redis.link import Link

__all__ = ["RedisStore"]

CHANGES_REMEMBERED: Final = 10_000
"""Routes that changed last; a replica that knows only an older version is told all routes."""

_MICROSECONDS: Final = 1_000_000
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
        self._later: dict[tuple[str, ...], Step] = {}
        """What could not be given back or told yet, by what it is about."""
        self._touched: dict[SandboxId, float] = {}
        self._numbers: dict[str, int] = {}
        """The highest session number seen here, by key of names: it survives a flush of Redis."""
        self.warned: tuple[str, ...] = ()
        self.trusted = ""
        """The filling of the database in which every name that is held is known to be there."""
        self.refilling = False
        self.restorers: list[Callable[[], Awaitable[None]]] = []

    # -- routes

    async def put_route(self, record: Mapping[str, Any]) -> None:
        sandbox_id = str(record["sandbox_id"])
        self._later.pop(("route", sandbox_id), None)
        text = json.dumps(record, separators=(",", ":"))
        keys = self._keys("routes", "order", "changed", "version")
        news = self._feed.name(ROUTE_NEWS)
        await self._script("put_route", keys, sandbox_id, record["generation"], text, news, CHANGES_REMEMBERED)

    async def drop_route(self, sandbox_id: SandboxId) -> None:
        self._touched.pop(sandbox_id, None)
        keys = self._keys("routes", "order", "changed", "version", "calls")
        args = (sandbox_id, self._feed.name(ROUTE_NEWS), CHANGES_REMEMBERED)
        await self._now_or_later(("route", sandbox_id), partial(self._script, "drop_route", keys, *args))

    async def routes(self) -> list[Mapping[str, Any]]:
        return list((await self.route_changes(None)).bound)

    async def route_changes(self, since: str | None) -> RouteChanges:
        filling, _, number = (since or "").partition(":")
        keys = self._keys("routes", "order", "changed", "version", "epoch")
        answer = await self._script("route_changes", keys, filling, number or 0, CHANGES_REMEMBERED)
        now, version, which, ids, records = answer
        return RouteChanges(
            version=f"{now}:{version}",
            bound=[json.loads(record.partition(":")[2]) for record in records if record is not None],
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
        restoring: bool = False,
    ) -> SessionName:
        names = self._owned("names", owner, scope)
        if wanted is not None:
            self._later.pop((names, wanted, sandbox_id), None)
        keys, floor = [names, self._key("epoch")], self._numbers.get(names, 0)
        trusted = "" if restoring else self.trusted
        given, *more = await self._script("reserve_session", keys, wanted or "", sandbox_id, floor, trusted)
        _refuse_while_refilling(given)
        if not given:
            raise SessionTaken(
                f"session {wanted} is in use; choose another name, or none to be given one", holder=more[0]
            )
        name, number = more
        self._numbers[names] = max(int(number), self._numbers.get(names, 0))
        return SessionName(name)

    async def release_session(self, owner: str, scope: Scope, session: SessionName, sandbox_id: SandboxId) -> None:
        names = self._owned("names", owner, scope)
        step = partial(self._script, "release_session", [names], session, sandbox_id)
        await self._now_or_later((names, session, sandbox_id), step)

    async def claim_key(
        self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId, *, restoring: bool = False
    ) -> SandboxId:
        name = self._owned("key", owner, scope, key)
        self._later.pop((name, sandbox_id), None)
        trusted = "" if restoring else self.trusted
        given, *holder = await self._script("claim_key", [name, self._key("epoch")], sandbox_id, trusted)
        _refuse_while_refilling(given)
        return SandboxId(holder[0])

    async def release_key(self, owner: str, scope: Scope, key: str, sandbox_id: SandboxId) -> None:
        name = self._owned("key", owner, scope, key)
        await self._now_or_later((name, sandbox_id), partial(self._script, "release_key", [name], sandbox_id))

    # -- leases

    async def grant(self, name: str, holder: str, ttl_seconds: float) -> Lease:
        self._later.pop(("lease", name, holder), None)
        taken, *found = await self._script("grant", self._keys(f"lease:{name}"), holder, _micros(ttl_seconds))
        if not taken:
            raise LeaseHeld(f"{found[0]} holds {name} for now", holder=found[0])
        token, expiry = found
        return Lease(name, holder, int(token), int(expiry) / _MICROSECONDS)

    async def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        keys = self._keys(f"lease:{lease.name}")
        expiry = await self._script("renew", keys, lease.holder, lease.token, _micros(ttl_seconds))
        if not expiry:
            raise LeaseLost(f"{lease.holder} no longer holds {lease.name}")
        return replace(lease, expires_at=int(expiry) / _MICROSECONDS)

    async def release(self, lease: Lease) -> None:
        step = partial(self._script, "release", self._keys(f"lease:{lease.name}"), lease.holder, lease.token)
        await self._now_or_later(("lease", lease.name, lease.holder), step)

    # -- calls

    async def touch(self, calls: Mapping[SandboxId, float]) -> None:
        for sandbox_id, at in calls.items():
            self._touched[sandbox_id] = max(at, self._touched.get(sandbox_id, at))
        await self._now_or_later(("touch",), self._send_touched)

    async def _send_touched(self) -> None:
        sending = dict(self._touched)
        if sending:
            await self._link.do(lambda: self._client.zadd(self._key("calls"), sending, gt=True))
        for sandbox_id, at in sending.items():
            if self._touched.get(sandbox_id) == at:
                del self._touched[sandbox_id]

    async def last_calls(self) -> Mapping[SandboxId, float]:
        kept = await self._link.do(lambda: self._client.zrange(self._key("calls"), 0, -1, withscores=True))
        return {SandboxId(name): float(score) for name, score in kept}

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
        # others may never have lost their connection, so that they must hear later that something was not said
        later = partial(self._publish, channel, LOST)
        await self._now_or_later(("news", channel), partial(self._publish, channel, message), later)

    async def _publish(self, channel: str, message: str) -> None:
        name = self._feed.name(channel)
        await self._link.do(lambda: self._client.publish(name, message))

    def subscribe(self, channel: str) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        return self._feed.subscribe(channel)

    # -- state

    def unready(self) -> str | None:
        if self._link.away is not None:
            return self._link.away
        return "Redis has lost what it held; routes and names are being put back" if self.refilling else None

    def warnings(self) -> Sequence[str]:
        return self.warned

    def on_flushed(self, restore: Callable[[], Awaitable[None]]) -> None:
        self.restorers.append(restore)

    # -- for the one who keeps it going

    async def filling(self) -> str:
        """Return the name of the database's present filling: another one may lack what was written."""
        return await self._script("filling", self._keys("epoch"))

    async def settle(self) -> None:
        """Do what had to wait.

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
        """Tell a database that has forgotten them which session numbers were given."""
        known = list(self._numbers.items())
        for first in range(0, len(known), _NUMBERS_AT_ONCE):
            names, numbers = zip(*known[first : first + _NUMBERS_AT_ONCE], strict=True)
            await self._script("raise_numbers", names, *numbers)

    async def _now_or_later(self, about: tuple[str, ...], step: Step, later: Step | None = None) -> None:
        """Take a step, or keep it for `settle`: at once where Redis is known to be away."""
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


def _micros(seconds: float) -> int:
    return round(seconds * _MICROSECONDS)


@cache
def _texts() -> Mapping[str, str]:
    folder = files("ash_router.store.redis") / "scripts"
    texts = {file.name.removesuffix(".lua"): file.read_text() for file in folder.iterdir()}
    prelude = texts.pop("prelude")
    return {name: prelude + text for name, text in texts.items()}
