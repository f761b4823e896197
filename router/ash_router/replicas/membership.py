"""The replicas of a hive as one of them sees the others: who lives, and where each takes what is forwarded to it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import anyio
import anyio.abc

from ash_mcp.errors import AshError
from ash_router.store.base import Store

__all__ = ["MISSED_SECONDS", "TICK_SECONDS", "Replicas", "new_replica_id", "split_address"]

log = logging.getLogger("ash.router")

TICK_SECONDS: Final = 1.0
TTL_SECONDS: Final = 4.0
"""How long a replica that died without a word still counts as living."""
ASK_SECONDS: Final = 0.5
"""How long a request waits for the store to say where a replica is that is not known here."""
GOOD_SECONDS: Final = 15.0
"""How long what was known holds while the store is away."""
MISSED_SECONDS: Final = 2.5
"""How long a replica still counts that a look did not find: a store that was emptied is told of all again."""
_LEAVE_SECONDS: Final = 1.0

_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_ID_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz0123456789"


def new_replica_id() -> str:
    """Return a fresh replica id; a process that starts again is another replica."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(8))


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[host]:port`.

    Raises:
        ValueError: It is no such thing.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None or not 0 < int(parts[3]) < 65536:
        raise ValueError(f"{address!r} is not host:port")
    return parts[1] or parts[2], int(parts[3])


class Replicas:
    """Announces this replica, and follows the others.

    Args:
        address: `host:port` at which the others reach this one; None where they cannot.
        details: What else this replica says of itself, each time that it does.
        grace_seconds: How long the others have to announce themselves after the store was away.
    """

    def __init__(
        self,
        store: Store,
        replica_id: str,
        address: str | None = None,
        *,
        details: Callable[[], Mapping[str, Any]] = dict,
        grace_seconds: float = TTL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grace_seconds = grace_seconds
        self.id = replica_id
        self.address = address
        self.details = details
        self.on_left: list[Callable[[str], None]] = []
        """Learn of each replica that lives no more."""
        self._store = store
        self._clock = clock
        self._others: Mapping[str, Mapping[str, Any]] = {}
        self._found_at: dict[str, float] = {}
        self._looked_at = float("-inf")
        self._outage_until = float("-inf")
        """When every replica has had time to announce itself since the store was away."""
        self._sure_from = float("inf")
        """When every replica has had time to announce itself since the store was away, or since this one began."""
        self._looks = 0
        self.is_cut_off = False
        """Whether the last look failed; the next one is a tick away."""
        self._has_left = False
        self._announcing = asyncio.Lock()
        self._looking = asyncio.Lock()

    def others(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what every other living replica says of itself, as of the last look."""
        return self._others if self._clock() - self._looked_at <= GOOD_SECONDS else {}

    def living(self) -> frozenset[str]:
        """Return the ids of the replicas that live, with this one's."""
        return frozenset((self.id, *self.others()))

    def can_judge(self) -> bool:
        """Say whether a replica that is not among the others surely lives no more.

        Not while the store is away, nor before every replica had time to announce itself again.
        """
        now = self._clock()
        return now - self._looked_at <= MISSED_SECONDS and now >= self._sure_from

    def knows_all(self) -> bool:
        """Say whether a replica that is not among the others is most likely gone.

        As `can_judge`, but also of one that has just begun, which a store that was emptied before that could deceive.
        """
        now = self._clock()
        return now - self._looked_at <= MISSED_SECONDS and now >= self._outage_until

    async def address_of(self, replica: str) -> str | None:
        """Return where a replica takes requests, asking the store at once for one that is not known here."""
        if replica == self.id:
            return self.address
        if replica not in self.others():
            with suppress(TimeoutError, AshError):
                async with asyncio.timeout(ASK_SECONDS):
                    await self.look()
        address: Any = self.others().get(replica, {}).get("address")
        return address if isinstance(address, str) else None

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Announce and look until cancelled, then withdraw; started once that was tried for the first time."""
        try:
            await self.tick()
            task_status.started()
            while True:
                await asyncio.sleep(TICK_SECONDS)
                await self.tick()
        finally:
            with anyio.move_on_after(_LEAVE_SECONDS, shield=True):
                await self._store.withdraw_replica(self.id)

    async def tick(self) -> None:
        """Announce this replica and look for the others, once; what fails is done at the next tick."""
        try:
            await self.announce()
            await self.look()
        except AshError as error:
            log.debug("going on with the replicas known here", extra={"why": error.message})

    async def announce(self) -> None:
        """Tell the others at once what this replica says of itself now.

        Raises:
            ConnectFailed: The store is away.
        """
        async with self._announcing:
            if not self._has_left:
                said = {**self.details(), "address": self.address}
                await self._store.announce_replica(self.id, said, TTL_SECONDS)

    async def leave(self) -> bool:
        """Withdraw for good, and say whether another replica lives.

        Raises:
            ConnectFailed: The store is away.
        """
        async with self._announcing:  # after one that is on its way, which would put it back
            self._has_left = True
            await self._store.withdraw_replica(self.id)
        living = (await self._store.replicas()).keys() - {self.id}
        return bool(living) or (self._clock() < self._outage_until and bool(self._others))

    async def look(self) -> None:
        """Take over who lives now; callers at the same time share one look.

        Raises:
            ConnectFailed: The store is away.
        """
        looks = self._looks
        async with self._looking:
            if self._looks > looks:  # one that began after this caller came
                return
            self._looks += 1
            try:
                living = await self._store.replicas()
            except AshError:
                self.is_cut_off = True
                raise
            self.is_cut_off = False
            self._found(living)

    def _found(self, living: Mapping[str, Mapping[str, Any]]) -> None:
        known, now = self._others, self._clock()
        if now - self._looked_at > MISSED_SECONDS:  # the store was away, and nobody could announce itself
            self._sure_from = now + self._grace_seconds
            if self._looked_at > float("-inf"):
                self._outage_until = self._sure_from
            self._found_at = dict.fromkeys(known, self._sure_from - MISSED_SECONDS)
        self._looked_at = now
        for replica in living.keys() - {self.id}:
            self._found_at[replica] = max(now, self._found_at.get(replica, now))
        self._found_at = {
            replica: at for replica, at in self._found_at.items() if self._looked_at - at < MISSED_SECONDS
        }
        self._others = {replica: living.get(replica) or known[replica] for replica in self._found_at}
        for replica in known.keys() - self._others.keys():
            for told in self.on_left:
                told(replica)
