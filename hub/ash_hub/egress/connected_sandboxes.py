"""The sandboxes connected to a cluster's egress proxy, with the network policies that it fetches from the hive.

A fetched policy is a lease of `POLICY_LEASE_SECONDS`. The hive answers from the sandbox's record, so once that time
has passed after a change of the record no proxy applies the old policy; nobody has to know which proxies there are.
While no hive answers, open connections stand still, and the next answer lets them go on or cuts them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from .audit import Audit, Record
from .exchange import OuterNetwork
from .lease import Lease
from .limits import Limits
from .names import Address
from .policy import Policy
from .proxy import SandboxProxy
from .refusal import Refusal, answer
from .signing import MOST_ASKED
from .wire import End

__all__ = ["POLICY_LEASE_SECONDS", "AskHive", "ConnectedSandboxes"]

POLICY_LEASE_SECONDS = 2.0
"""How long a policy may be applied, counted from when it was asked for."""
_REFRESH_SECONDS = 0.8
"""How often the policy of a sandbox with open connections is fetched again."""
_IDLE_REFRESH_SECONDS = 60.0
"""The same for a sandbox without one; it is forgotten once it has ended."""
_RETRY_SECONDS = 0.2
_FIRST_ANSWER_SECONDS = 10.0
"""How long a connection waits for the first answer about its sandbox."""

AskHive = Callable[[Sequence[str]], Awaitable[Mapping[str, Any]]]
"""Returns, by sandbox id, the `policy`, `limits` and `addresses`, or None for a sandbox that does not exist.

Raises OSError or ValueError where the hive does not answer, in bounded time.
"""


@dataclass(slots=True)
class _ConnectedSandbox:
    lease: Lease = field(default_factory=Lease)
    proxy: SandboxProxy | None = None
    """None before the first answer that says where the sandbox is."""
    policy: Policy | None = None
    addresses: frozenset[Address] = frozenset()
    asked_at: float = float("-inf")
    has_proxy: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])
    """One for each connection."""

    @property
    def due_at(self) -> float:
        if self.proxy is None:
            return self.asked_at + _RETRY_SECONDS
        return self.asked_at + (_REFRESH_SECONDS if self.tasks else _IDLE_REFRESH_SECONDS)


class ConnectedSandboxes:
    """Every sandbox that has connected, until the hive says that it is gone.

    Args:
        write: Takes each decision; False where it could not.
    """

    def __init__(self, ask: AskHive, outside: OuterNetwork, write: Callable[[Record], bool]) -> None:
        self._ask = ask
        self._outside = outside
        self._write = write
        self._audit_unknown = Audit(write, event="egress")
        self._sandboxes: dict[str, _ConnectedSandbox] = {}
        self._connected = asyncio.Event()
        self._last_report = ("", "")
        self.answered = False
        """Whether the hive has ever answered."""

    async def run(self) -> None:
        """Fetch policies until cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            self._connected.clear()
            due = sorted((it.due_at, sandbox) for sandbox, it in self._sandboxes.items())
            ids = [sandbox for at, sandbox in due if at <= now()][:MOST_ASKED]
            if ids or not self.answered:
                if not await self._learn(ids):
                    await asyncio.sleep(_RETRY_SECONDS)
                continue
            try:
                async with asyncio.timeout_at(due[0][0] if due else None):
                    await self._connected.wait()
            except TimeoutError:
                pass

    async def _learn(self, ids: Sequence[str]) -> bool:
        """Ask the hive about sandboxes once; return whether it answered."""
        asked_at = asyncio.get_running_loop().time()
        try:
            answers = await self._ask(ids)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._report("away", str(error) or type(error).__name__)
            return False
        self.answered = True
        said = "answers"
        for sandbox in ids:
            entry = self._sandboxes[sandbox]
            entry.asked_at = asked_at
            try:
                if (found := answers[sandbox]) is None:
                    self._end(sandbox)
                else:
                    self._apply(sandbox, entry, found, asked_at)
            except (ValueError, KeyError, TypeError) as error:  # it stands still, and no other
                said = f"what it says of {sandbox} cannot be read: {error}"
        self._report("there", said)
        return True

    def _report(self, outcome: str, message: str) -> None:
        """Write whether the hive answers, when that has changed."""
        if self._last_report != (outcome, message):
            self._last_report = outcome, message
            self._write({"event": "hive", "time": round(time.time(), 3), "outcome": outcome, "message": message})

    def _end(self, sandbox: str) -> None:
        for task in self._sandboxes.pop(sandbox).tasks:
            task.cancel()

    def _apply(self, sandbox: str, entry: _ConnectedSandbox, found: Mapping[str, Any], asked_at: float) -> None:
        policy = Policy.parse(found["policy"])
        if entry.proxy is None:
            entry.addresses = frozenset(ip_address(each) for each in found["addresses"])
            if not entry.addresses:
                return  # its node has yet to say where it is
            audit = Audit(self._write, event="egress", sandbox=sandbox, policy=policy.text)
            entry.proxy = SandboxProxy(policy, Limits.of(found["limits"]), self._outside, audit, entry.lease)
            entry.has_proxy.set()
        elif policy != entry.policy:
            entry.proxy.set_policy(policy)
        entry.policy = policy
        entry.lease.renew(asked_at + POLICY_LEASE_SECONDS)

    async def serve(self, sandbox: str, client: End, peer: Address) -> None:
        """Serve a connection of a sandbox, to its end."""
        task = asyncio.current_task()
        assert task is not None
        entry = self._sandboxes.setdefault(sandbox, _ConnectedSandbox())
        entry.tasks.add(task)
        self._connected.set()
        try:
            async with asyncio.timeout(_FIRST_ANSWER_SECONDS):
                await entry.has_proxy.wait()
            proxy = entry.proxy
            if proxy is None or peer not in entry.addresses:
                await self.refuse(client, Refusal("not_its_address", f"{peer} is not the address of {sandbox}"))
            else:
                await proxy.serve_connection(client)
        except Refusal as refusal:
            await self.refuse(client, refusal)
        except TimeoutError:
            message = "the hive does not say what this sandbox may reach"
            await self.refuse(client, Refusal("hive_away", message, status=503))
        finally:
            entry.tasks.discard(task)
            client.abort()

    async def refuse(self, client: End, refusal: Refusal) -> None:
        """Refuse a connection that belongs to no known sandbox, with the reason."""
        self._audit_unknown({"decision": refusal.verdict, "reason": refusal.reason, "message": refusal.message})
        await client.send_last(answer(refusal, policy="none", target=None))
