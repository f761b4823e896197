"""Calls without end while hives are killed: what came of each, and whether any ran twice or in the wrong sandbox.

The truth is asked of three: the caller knows what it sent and got, nginx which hive had it, and the sandbox what ran.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import httpx
from cluster import Cluster

from ash_mcp import Hive, StreamBroken

MODERN = "2026-07-28"
LEGACY = "2025-06-18"
WAYS = ("its own name", "call", "X-Session-ID", "handshake, its own name", "handshake, call")
SANDBOXES = 6
CALLERS = 24
SLACK_SECONDS = 0.3
"""How long after a kill its effects may show: nginx and the other hives notice a broken connection at once."""
CALL_SECONDS = 30.0
MOST_HANDSHAKES = 1000
"""Of one caller: a hive that forgets every session would be asked for ever."""
META: dict[str, Any] = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
}


@dataclass
class Call:
    """One call and what came of it."""

    number: int
    way: str
    sandbox: str
    sent_at: float
    ended_at: float = 0.0
    outcome: str = ""
    """`done`, the kind of a typed failure, or `untyped: …`."""
    retryable: bool | None = None
    owner: str | None = None
    """The replica that held the handshake-era session it was made in."""


@dataclass
class Session:
    """A handshake-era session of one caller, which is begun anew when its hive is gone."""

    id: str | None = None
    handshakes: int = 0


@dataclass
class Figures:
    calls: list[Call] = field(default_factory=list[Call])
    kills: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    """`host:port` and when."""
    handshakes: int = 0
    """Beyond the first of each caller."""
    problems: list[str] = field(default_factory=list[str])


class Storm:
    """A load on a cluster, and its account."""

    def __init__(self, cluster: Cluster, *, seconds: float, calls: int, kill_every: float) -> None:
        self._cluster = cluster
        self._seconds = seconds
        self._wanted = calls
        self._kill_every = kill_every
        self._numbers = itertools.count(1)
        self._hellos: dict[str, str] = {}
        """Replica id -> the name that nginx knows of a request by which a session on it began."""
        self.figures = Figures()

    async def run(self) -> Figures:
        """Spawn, call under kills, and compare with what the sandboxes noted."""
        async with Hive(self._cluster.url) as hive:
            boxes = [
                await hive.spawn("counter", session=f"box{number}", env={"WHO": f"box{number}"})
                for number in range(SANDBOXES)
            ]
            names = [(box.session, box.id) for box in boxes]
            await self._warm_up(names)
            begun = time.monotonic()
            async with anyio.create_task_group() as group:
                group.start_soon(self._kill, begun)
                for number in range(CALLERS):
                    group.start_soon(self._caller, number, begun, names)
            await anyio.to_thread.run_sync(self._all_back)
            await self._compare(hive, [box.session for box in boxes])
            await hive.destroy(*(box.session for box in boxes))
        self._judge()
        return self.figures

    # -- the load

    async def _warm_up(self, boxes: Sequence[tuple[str, str]]) -> None:
        """Call each sandbox once in each way: what a server loads at its first call is not to be measured."""
        async with httpx.AsyncClient(timeout=CALL_SECONDS) as http:
            for name, sandbox_id in boxes:
                for number, way in enumerate(WAYS, 1):
                    await self._make(http, Call(-number, way, name, time.time()), sandbox_id, Session())

    async def _caller(self, number: int, begun: float, boxes: Sequence[tuple[str, str]]) -> None:
        chance, session = random.Random(number), Session()
        async with httpx.AsyncClient(timeout=CALL_SECONDS) as http:
            for turn in self._numbers:
                await anyio.sleep(max(0.0, begun + turn * self._seconds / self._wanted - time.monotonic()))
                if self._is_over(begun):
                    break
                name, sandbox_id = chance.choice(boxes)
                call = Call(turn, chance.choice(WAYS), name, time.time())
                self.figures.calls.append(call)
                await self._make(http, call, sandbox_id, session)
        self.figures.handshakes += max(0, session.handshakes - 1)

    def _is_over(self, begun: float) -> bool:
        return time.monotonic() - begun >= self._seconds or len(self.figures.calls) >= self._wanted

    async def _make(self, http: httpx.AsyncClient, call: Call, sandbox_id: str, session: Session) -> None:
        try:
            if call.way.startswith("handshake"):
                answer = await self._in_session(http, call, session)
            else:
                headers, body = _stateless(call, sandbox_id)
                answer = await self._post(http, call, headers, body)
            _read(call, answer)
        except httpx.HTTPError:
            # an answer that had begun broke off, for which nobody on the way can say more: the SDK gives it this type
            call.outcome, call.retryable = StreamBroken.kind, StreamBroken.retryable
        call.ended_at = time.time()

    async def _in_session(self, http: httpx.AsyncClient, call: Call, session: Session) -> httpx.Response:
        while True:
            if session.id is None:
                hello = await self._post(http, call, {}, _request("initialize", _HELLO, call.number), suffix="h")
                if hello.status_code != 200:
                    return hello
                session.id, session.handshakes = hello.headers["mcp-session-id"], session.handshakes + 1
                self._hellos[session.id.partition(".")[0]] = f"{call.number}h"
                done = {"jsonrpc": "2.0", "method": "notifications/initialized"}
                await self._post(http, call, self._session_headers(session), done, suffix="i")
            call.owner = session.id.partition(".")[0]
            params = _tool_call(call, by_name=call.way.endswith("its own name"))
            body = _request("tools/call", params, call.number)
            call.sent_at = time.time()
            answer = await self._post(http, call, self._session_headers(session), body)
            if answer.status_code != 404 or session.handshakes > MOST_HANDSHAKES:
                return answer
            session.id = None  # its hive is gone, and the call did not run: begin anew, as the protocol says

    @staticmethod
    def _session_headers(session: Session) -> dict[str, str]:
        return {"mcp-session-id": session.id or "", "mcp-protocol-version": LEGACY}

    async def _post(
        self, http: httpx.AsyncClient, call: Call, headers: dict[str, str], body: Any, suffix: str = ""
    ) -> httpx.Response:
        standing = {"accept": "application/json, text/event-stream", "x-call-id": f"{call.number}{suffix}"}
        return await http.post(self._cluster.url, headers={**standing, **headers}, json=body)

    # -- the kills

    async def _kill(self, begun: float) -> None:
        chance = random.Random(0)
        while not self._is_over(begun):
            await anyio.sleep(self._kill_every)
            ready = [each for each in self._cluster.replicas if await anyio.to_thread.run_sync(each.is_ready)]
            if len(ready) < 2:  # with none left there is no hive
                continue
            victim = chance.choice(ready)
            await anyio.to_thread.run_sync(victim.kill)
            self.figures.kills.append((f"127.0.0.1:{victim.port}", victim.killed_at[-1]))
            victim.start()

    def _all_back(self) -> None:
        for replica in self._cluster.replicas:
            replica.wait()

    # -- the account

    async def _compare(self, hive: Hive, sessions: Sequence[str]) -> None:
        ran: dict[str, Counter[int]] = {}
        for session in sessions:
            box = await hive.attach(session)
            ran[session] = Counter(int(line) for line in (await box.files.read("calls")).split())
            twice = [number for number, times in ran[session].items() if times > 1]
            if twice:
                self.figures.problems.append(f"ran twice in {session}: {twice[:10]}")
        for call in self.figures.calls:
            if call.outcome == "done" and not ran[call.sandbox][call.number]:
                self.figures.problems.append(f"call {call.number} was answered and did not run in {call.sandbox}")
            elsewhere = [session for session in sessions if session != call.sandbox and ran[session][call.number]]
            if elsewhere:
                self.figures.problems.append(f"call {call.number} for {call.sandbox} ran in {elsewhere}")
        for replica in self._cluster.replicas:
            async with Hive(replica.url) as one:
                found = {info.session for info in await one.list()}
            if found != set(sessions):
                self.figures.problems.append(f"the hive at {replica.url} has {sorted(found)}")

    def _judge(self) -> None:
        """Find calls that failed although no hive that had them was killed, and failures without a type."""
        had = self._who_had()
        owners = {replica: had.get(hello, set()) for replica, hello in self._hellos.items()}
        for call in self.figures.calls:
            if call.outcome == "done":
                continue
            if call.outcome.startswith("untyped") or call.retryable is None:
                self.figures.problems.append(f"call {call.number} ({call.way}): {call.outcome}")
            names = (f"{call.number}{suffix}" for suffix in ("", "h", "i"))
            hives = set[str]().union(*(had.get(name, ()) for name in names), owners.get(call.owner or "", ()))
            if not any(
                hive in hives and call.sent_at - SLACK_SECONDS <= at <= call.ended_at + SLACK_SECONDS
                for hive, at in self.figures.kills
            ):
                self.figures.problems.append(
                    f"call {call.number} ({call.way}) failed on no hive that was killed: {call.outcome}, {hives}"
                )

    def _who_had(self) -> dict[str, set[str]]:
        """Return which hives got each request, by nginx's log."""
        had: dict[str, set[str]] = {}
        for line in self._cluster.call_log.read_text().splitlines():
            name, *rest = line.split()
            had.setdefault(name, set()).update(word.strip(",") for word in rest[:-1])
        return had


_HELLO = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "storm", "version": "1"}}


def _request(method: str, params: Any, number: int) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def _tool_call(call: Call, *, by_name: bool) -> dict[str, Any]:
    arguments = {"number": call.number}
    if by_name:
        return {"name": f"{call.sandbox}_note", "arguments": arguments}
    return {"name": "call", "arguments": {"session": call.sandbox, "tool": "note", "arguments": arguments}}


def _stateless(call: Call, sandbox_id: str) -> tuple[dict[str, str], dict[str, Any]]:
    params = _tool_call(call, by_name=call.way != "call")
    headers = {"mcp-protocol-version": MODERN, "mcp-method": "tools/call"}
    if call.way == "X-Session-ID":
        params["name"], headers["x-session-id"] = "note", sandbox_id
    return {**headers, "mcp-name": params["name"]}, _request("tools/call", {**params, "_meta": META}, call.number)


def _read(call: Call, answer: httpx.Response) -> None:
    """Note what came of a call."""
    try:
        body = _body(answer)
        failure = _failure(body)
    except (ValueError, KeyError, TypeError) as error:
        call.outcome = f"untyped: {answer.status_code} {error!r} {answer.text[:200]!r}"
        return
    if failure is not None:
        call.outcome, call.retryable = failure["kind"], failure["retryable"]
        return
    said = body["result"]["structuredContent"]
    if said != {"who": call.sandbox, "number": call.number}:
        call.outcome = f"untyped: call {call.number} for {call.sandbox} was answered {said}"
        return
    call.outcome = "done"


def _body(answer: httpx.Response) -> dict[str, Any]:
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        lines = [line[5:] for line in answer.text.splitlines() if line.startswith("data:") and line[5:].strip()]
        return json.loads(lines[-1])
    return answer.json()


def _failure(body: dict[str, Any]) -> dict[str, Any] | None:
    if "error" in body:
        error = body["error"]
        return error if "kind" in error else error["data"]
    result = body["result"]
    return result["_meta"]["ash/failure"] if result.get("isError") else None
