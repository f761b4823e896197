"""Parts of the tests of replicas whose Redis is far away: the hives, the distance, and what each replica answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx

from ash_mcp.wire import FAILURE_META_KEY
from tests.delaying_proxy import DelayingProxy, delaying
from tests.hub.backends.local.local_parts import leftovers, sandbox_launchers
from tests.redis_server import RedisServer
from tests.system.crash_parts import Home, home
from tests.system.owners import MODERN

__all__ = ["FarHive", "Replica", "Said", "check_ends", "far_hive"]


ONE_WAY_SECONDS: Final = 0.1
JITTER_SECONDS: Final = 0.02
HEALS_WITHIN: Final = 20.0
"""A replica, after Redis is back; the machine may be busy."""
MAY_STAY: Final[Mapping[str, str]] = {
    "ash:epoch": "names the epoch of the database",
    "ash:layout": "names the layout of the keys",
    "ash:version": "counts the changes of routes",
    "ash:changed": "which routes changed last, bounded: a replica that was cut off asks for it",
    "ash:replicas": "who lives; expires",
    "ash:shelf:ended": "why sandboxes ended, for an hour and the last thousand",
    "ash:shelf:toolsets": "tool lists, cached: at most 256, for a day",
    "ash:names:": "the last session number that was given, and no name",
    "ash:key:": "what a spawn that comes again is told, as long as its owner can read why its sandbox ended",
}
"""Beginnings of keys that outlive every sandbox, and why."""
_SHOWN: Final = 20_000
"""Of what the hives logged, where a test fails."""
_META: Final[Mapping[str, Any]] = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "far", "version": "1"},
}
_HEADERS: Final = {"accept": "application/json, text/event-stream", "mcp-protocol-version": MODERN}


@dataclass(frozen=True, slots=True)
class Said:
    """An answer: a result, a typed failure, or neither."""

    result: Mapping[str, Any] = field(default_factory=dict[str, Any])
    failure: Mapping[str, Any] | None = None
    untyped: str | None = None

    @property
    def good(self) -> bool:
        return self.failure is None and self.untyped is None

    @property
    def content(self) -> Any:
        """The structured content of a result."""
        return self.result.get("structuredContent")

    @property
    def kind(self) -> str:
        return "ok" if self.good else f"untyped: {self.untyped}" if self.failure is None else self.failure["kind"]

    @property
    def may_be_repeated(self) -> bool:
        return self.failure is not None and self.failure.get("retryable") is True


@dataclass
class Replica:
    """One hive of several, asked once each time: nothing is repeated."""

    url: str
    process: subprocess.Popen[str]
    http: httpx.AsyncClient

    async def tool(self, tool: str, **arguments: Any) -> Said:
        return await self._ask("tools/call", {"name": tool, "arguments": arguments}, tool)

    async def list_tools(self) -> Said:
        """Return the list; it is one page as long as it is not huge."""
        return await self._ask("tools/list", {}, None)

    async def sandboxes(self, *, ended: bool = False) -> dict[str, Any]:
        """Return each sandbox that it lists, by its id."""
        said = await self.tool("list", include_ended=ended)
        assert said.good, f"{self.url} does not list: {said}"
        return {box["sandbox_id"]: box for box in said.content["sandboxes"]}

    async def is_ready(self) -> bool:
        try:
            return (await self.http.get(self.url.replace("/mcp", "/readyz"), timeout=2)).status_code == 200
        except httpx.HTTPError:
            return False

    async def becomes_ready(self) -> None:
        with anyio.fail_after(HEALS_WITHIN):
            while not await self.is_ready():
                await anyio.sleep(0.1)

    async def _ask(self, method: str, params: Mapping[str, Any], name: str | None) -> Said:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {**params, "_meta": _META}}
        headers = {**_HEADERS, "mcp-method": method, **({} if name is None else {"mcp-name": name})}
        try:
            answer = await self.http.post(self.url, json=message, headers=headers)
        except httpx.HTTPError as error:
            return Said(untyped=repr(error))
        return _read(answer)


def _read(answer: httpx.Response) -> Said:
    text = answer.text
    if "data: " in text:
        text = text.split("data: ")[-1].split("\n")[0]
    untyped = Said(untyped=f"{answer.status_code} {text[:500]}")
    try:
        message: dict[str, Any] = json.loads(text)
    except ValueError:
        return untyped
    error: dict[str, Any] = message.get("error") or {}
    failure: Any = error if "kind" in error else error.get("data")
    if "result" in message:
        result: dict[str, Any] = message["result"]
        if not result.get("isError"):
            return Said(result=result)
        failure = result.get("_meta", {}).get(FAILURE_META_KEY)
    return Said(failure=failure) if failure and "kind" in failure else untyped


@dataclass
class FarHive:
    """Replicas on one keeper and one Redis, which is `ONE_WAY_SECONDS` away."""

    place: Home
    server: RedisServer
    proxy: DelayingProxy
    http: httpx.AsyncClient
    replicas: list[Replica] = field(default_factory=list[Replica])

    async def start(self) -> Replica:
        url = await anyio.to_thread.run_sync(self.place.start)
        replica = Replica(url, self.place.hubs[-1], self.http)
        self.replicas.append(replica)
        return replica

    async def kill(self, replica: Replica) -> None:
        replica.process.kill()
        await self._wait_for_end(replica)

    async def stop(self, replica: Replica) -> int:
        """End a replica as an operator does and return its exit code."""
        replica.process.terminate()
        return await self._wait_for_end(replica)

    async def _wait_for_end(self, replica: Replica) -> int:
        await anyio.to_thread.run_sync(lambda: replica.process.communicate(timeout=60))
        self.place.hubs.remove(replica.process)
        self.replicas.remove(replica)
        return replica.process.returncode

    async def all_ready(self) -> None:
        for replica in self.replicas:
            await replica.becomes_ready()

    def ended_replicas(self) -> list[int]:
        """Return the exit codes of replicas that nobody ended."""
        return [code for each in self.replicas if (code := each.process.poll()) is not None]

    def left_in_redis(self) -> list[str]:
        """Name what is kept of sandboxes, though none lives."""
        found: list[str] = []
        for key in self.server.ask("KEYS", "*"):
            if not key.startswith(tuple(MAY_STAY)):
                found.append(f"{key}: {self._value(key)}")
            elif key.startswith("ash:names:"):
                fields = self.server.ask("HGETALL", key)
                found += [f"{key}: {name}" for name in fields if name[:2] in ("h:", "s:")]
        return found

    def _value(self, key: str) -> Any:
        ask = {"hash": ("HGETALL", key), "zset": ("ZRANGE", key, 0, -1), "string": ("GET", key)}
        command = ask.get(self.server.ask("TYPE", key))
        return self.server.ask(*command) if command is not None else "?"

    def left_on_the_host(self, ids: Sequence[str]) -> list[str]:
        """Name the directories, control groups and processes of sandboxes that ended."""
        found = [path for path in leftovers(self.place.settings) if "sbx-" in path]
        for part in (self.place.folder / "run", self.place.folder / "state"):
            kept = [path for path in part.rglob("*") if path.parent.name != "ended"]  # why they ended
            found += [str(path) for path in kept if any(name in path.name for name in ids)]
        keeper = self.place.keeper()
        below = [] if keeper is None else sandbox_launchers(keeper)
        return found + [f"process {pid}" for pid in below]

    async def nothing_left(self, ids: Sequence[str], within: float = 20.0) -> list[str]:
        """Wait until nothing is left of sandboxes that ended, and return what still is."""
        with anyio.move_on_after(within):
            while self.left_in_redis() or self.left_on_the_host(ids):
                await anyio.sleep(0.2)
        return self.left_in_redis() + self.left_on_the_host(ids)


@asynccontextmanager
async def far_hive(redis: RedisServer, replicas: int = 3, **environment: str) -> AsyncGenerator[FarHive]:
    """Start replicas on a Redis that is far away, and wait until they are ready."""
    async with (
        delaying(redis.port, delay_seconds=ONE_WAY_SECONDS, jitter_seconds=JITTER_SECONDS) as proxy,
        httpx.AsyncClient(timeout=90, limits=httpx.Limits(max_connections=None)) as http,
    ):
        with home(ASH_HUB_REDIS_URL=f"redis://127.0.0.1:{proxy.port}", **environment) as place:
            hive = FarHive(place, redis, proxy, http)
            try:
                for _ in range(replicas):
                    await hive.start()
                await hive.all_ready()
                yield hive
            except BaseException:
                sys.stderr.write(place.said()[-_SHOWN:])
                raise


async def check_ends(hive: FarHive, ended: list[str]) -> list[str]:
    """Name what any replica says wrongly of sandboxes that were all destroyed."""
    wrong: list[str] = []
    for number, replica in enumerate(hive.replicas):
        living = await replica.sandboxes()
        wrong += [f"replica {number} has {box['session']} as {box['status']}" for box in living.values()]
        told = await replica.sandboxes(ended=True)
        for sandbox_id in ended:
            reason = told[sandbox_id]["reason"] if sandbox_id in told else "nothing"
            if reason != "destroyed":
                wrong.append(f"replica {number} says {reason} of {sandbox_id}, which was destroyed")
    return wrong
