"""The sandboxes of a proxy that asks its hive for their policies: it acts on no answer for longer than `LIFE_SECONDS`.

The hive answers from what is recorded of a sandbox then. So whoever changes a record, and lets that time go by, knows
that no proxy acts on the old one, without knowing which proxies there are, whichever were started or lost meanwhile.
Where no hive answers, nothing passes: what is open stands still, and goes on or is cut by the next answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from .audit import Audit, Record
from .exchange import Outside
from .lease import Lease
from .limits import Limits
from .names import Address
from .policy import Policy
from .proxy import SandboxProxy
from .refusal import Refusal, answer
from .signing import MOST_ASKED
from .wire import End

__all__ = ["LIFE_SECONDS", "Ask", "Tenants"]

LIFE_SECONDS = 2.0
"""How long after it was asked for an answer may be acted on."""
_ANEW_SECONDS = 0.8
"""After how long it is asked anew for a sandbox that has connections."""
_IDLE_SECONDS = 60.0
"""The same for one that has none; it is forgotten once it has ended."""
_PAUSE_SECONDS = 0.2
_FIRST_SECONDS = 10.0
"""How long a connection waits for the first answer about its sandbox."""

Ask = Callable[[Sequence[str]], Awaitable[Mapping[str, Any]]]
"""Returns what the hive says of sandboxes: `policy`, `limits` and `addresses`, or None of one that is not there.

Raises OSError or ValueError where it does not, in bounded time.
"""


@dataclass(slots=True)
class _Tenant:
    lease: Lease = field(default_factory=Lease)
    proxy: SandboxProxy | None = None
    """None before the first answer that says where the sandbox is."""
    policy: Policy | None = None
    addresses: frozenset[Address] = frozenset()
    asked_at: float = float("-inf")
    known: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])
    """One for each connection."""

    @property
    def due_at(self) -> float:
        if self.proxy is None:
            return self.asked_at + _PAUSE_SECONDS
        return self.asked_at + (_ANEW_SECONDS if self.tasks else _IDLE_SECONDS)


class Tenants:
    """All sandboxes that have connected, until the hive says that they are gone.

    Args:
        write: Takes each decision; False where it could not.
    """

    def __init__(self, ask: Ask, outside: Outside, write: Callable[[Record], bool]) -> None:
        self._ask = ask
        self._outside = outside
        self._write = write
        self._strangers = Audit(write, event="egress")
        self._tenants: dict[str, _Tenant] = {}
        self._wanted = asyncio.Event()
        self._said = ("", "")
        self.answered = False
        """Whether the hive has ever answered."""

    async def run(self) -> None:
        """Ask until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            self._wanted.clear()
            due = sorted((it.due_at, sandbox) for sandbox, it in self._tenants.items())
            ids = [sandbox for at, sandbox in due if at <= now()][:MOST_ASKED]
            if ids or not self.answered:
                if not await self._learn(ids):
                    await asyncio.sleep(_PAUSE_SECONDS)
                continue
            try:
                async with asyncio.timeout_at(due[0][0] if due else None):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def _learn(self, ids: Sequence[str]) -> bool:
        """Ask about sandboxes once, and say whether an answer came."""
        asked_at = asyncio.get_running_loop().time()
        try:
            answers = await self._ask(ids)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say("away", str(error) or type(error).__name__)
            return False
        self.answered = True
        said = "answers"
        for sandbox in ids:
            tenant = self._tenants[sandbox]
            tenant.asked_at = asked_at
            try:
                if (told := answers[sandbox]) is None:
                    self._end(sandbox)
                else:
                    self._told(sandbox, tenant, told, asked_at)
            except (ValueError, KeyError, TypeError) as error:  # it stands still, and no other
                said = f"what it says of {sandbox} cannot be read: {error}"
        self._say("there", said)
        return True

    def _say(self, outcome: str, message: str) -> None:
        """Report how the hive answers, where that is news."""
        if self._said != (outcome, message):
            self._said = outcome, message
            self._write({"event": "hive", "time": round(time.time(), 3), "outcome": outcome, "message": message})

    def _end(self, sandbox: str) -> None:
        for task in self._tenants.pop(sandbox).tasks:
            task.cancel()

    def _told(self, sandbox: str, tenant: _Tenant, said: Mapping[str, Any], asked_at: float) -> None:
        policy = Policy.parse(said["policy"])
        if tenant.proxy is None:
            tenant.addresses = frozenset(ip_address(each) for each in said["addresses"])
            if not tenant.addresses:
                return  # its node has yet to say where it is
            audit = Audit(self._write, event="egress", sandbox=sandbox, policy=policy.text)
            tenant.proxy = SandboxProxy(policy, Limits.of(said["limits"]), self._outside, audit, tenant.lease)
            tenant.known.set()
        elif policy != tenant.policy:
            tenant.proxy.set_policy(policy)
        tenant.policy = policy
        tenant.lease.renew(asked_at + LIFE_SECONDS)

    async def serve(self, sandbox: str, client: End, peer: Address) -> None:
        """Serve a connection of a sandbox, to its end."""
        task = asyncio.current_task()
        assert task is not None
        tenant = self._tenants.setdefault(sandbox, _Tenant())
        tenant.tasks.add(task)
        self._wanted.set()
        try:
            async with asyncio.timeout(_FIRST_SECONDS):
                await tenant.known.wait()
            proxy = tenant.proxy
            if proxy is None or peer not in tenant.addresses:
                await self.refuse(client, Refusal("not_its_address", f"{peer} is not the address of {sandbox}"))
            else:
                await proxy.take(client)
        except Refusal as refusal:
            await self.refuse(client, refusal)
        except TimeoutError:
            message = "the hive does not say what this sandbox may reach"
            await self.refuse(client, Refusal("hive_away", message, status=503))
        finally:
            tenant.tasks.discard(task)
            client.abort()

    async def refuse(self, client: End, refusal: Refusal) -> None:
        """Tell a connection of nobody who is known here why it ends."""
        self._strangers({"decision": refusal.verdict, "reason": refusal.reason, "message": refusal.message})
        await client.part(answer(refusal, policy="none", target=None))
