"""A hive's stand-in for the SDK's tests: a `httpx` transport that speaks the stateless era as the real one does.

Requests are checked with the MCP SDK's own ladder, so that what it accepts a real server accepts. Everything it needs
lives in threads and locks, so one twin serves asyncio, trio and the sync SDK alike.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
from mcp.shared.inbound import InboundLadderRejection, classify_inbound_request, find_duplicated_routing_header

from ash_mcp import errors
from ash_mcp.errors import AshError
from ash_mcp.types import (
    Cause,
    EndReason,
    RunInfo,
    SandboxInfo,
    Scope,
    SessionName,
    ShareInfo,
    State,
    new_run_id,
    new_sandbox_id,
)
from ash_mcp.wire import (
    HEADER_NONCE,
    HEADER_ORIGIN,
    ORIGIN_HUB,
    ORIGIN_SANDBOX,
    failure_to_json,
    http_status,
    info_to_json,
    run_to_json,
    share_to_json,
    tool_failure,
)
from tests.ash_mcp.twin_door import answer_at_door
from tests.ash_mcp.twin_runner import Json, TwinRunner

Script = Callable[[httpx.Request], "httpx.Response | None"]
"""Stands before the twin for one request: answers it, raises, or returns None to let it through."""

TERMINAL = "terminal-controller_execute_command"

TOOLS = [
    {
        "name": TERMINAL,
        "title": "Run a command",
        "description": "Run a command in a shell.",
        "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    }
]


@dataclass
class TwinBox:
    info: SandboxInfo
    runner: TwinRunner
    shares: list[ShareInfo] = field(default_factory=list[ShareInfo])


@dataclass
class TwinRun:
    info: RunInfo
    key: str | None
    renewals: int = 0
    is_open: bool = True


@dataclass
class Seen:
    """One request that reached the twin."""

    tool: str
    arguments: Json
    headers: httpx.Headers


@dataclass
class TwinHive:
    root: Path
    recipes: Sequence[str] = ("general", "echo")
    boxes: dict[str, TwinBox] = field(default_factory=dict[str, TwinBox])
    by_key: dict[str, str] = field(default_factory=dict[str, str])
    runs: dict[str, TwinRun] = field(default_factory=dict[str, "TwinRun"])
    """By id."""
    most: int = 1000
    """Living sandboxes."""
    has_previews: bool = True
    """Whether browsers have a way to ports."""
    seen: list[Seen] = field(default_factory=list[Seen])
    through_door: list[httpx.Request] = field(default_factory=list[httpx.Request])
    """Requests to files."""
    scripts: deque[Script] = field(default_factory=deque[Script])
    after: deque[Script] = field(default_factory=deque[Script])
    """As `scripts`, but the request has run when one of these is asked: what it does is done to the answer."""
    spawning: threading.Lock = field(default_factory=threading.Lock)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._handle)

    def close(self) -> None:
        for box in self.boxes.values():
            box.runner.close()

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        raw = await request.aread()
        door = re.fullmatch(r"/s/([^/]+)/files(.*)", request.url.raw_path.decode())
        if door is not None:
            self.through_door.append(request)
            script = self.scripts.popleft()(request) if self.scripts else None
            workspace = self.boxes[door[1]].runner.workspace
            return script or answer_at_door(workspace, door[2], request.method, raw)
        body: Json = json.loads(raw)
        refused = _ladder(request, body)
        if refused is not None:
            return refused
        params: Json = body["params"]
        self.seen.append(Seen(params["name"], params["arguments"], request.headers))
        answer = self.scripts.popleft()(request) if self.scripts else None
        if answer is not None:
            return answer
        # `_do` runs in a thread, as its commands block; a caller who goes away does not wait for it.
        origin, result = await anyio.to_thread.run_sync(
            partial(self._do, params["name"], json.loads(json.dumps(params["arguments"]))), abandon_on_cancel=True
        )
        answer = self.after.popleft()(request) if self.after else None
        if answer is not None:
            return answer
        token = params["_meta"].get("progressToken")
        return stream_answer(body["id"], result, origin, token) if token else whole_answer(body["id"], result, origin)

    def _do(self, tool: str, asked: Json) -> tuple[str, Json]:
        doors: dict[str, Callable[[Json], Json]] = {
            "spawn": self._spawn,
            "destroy": self._destroy,
            "list": self._list,
            "extend": self._extend,
            "network": self._network,
            "run": self._run,
            "share": self._share,
            "ash_tools": lambda asked: self._alive(asked["session"]) and {"tools": TOOLS},
            "ash_logs": lambda asked: self._alive(asked["session"]) and {"log": "ready\n"[-asked["tail_bytes"] :]},
        }
        try:
            if tool == "call":
                return self._call(asked)
            shape = doors[tool](asked)
        except AshError as exc:
            return ORIGIN_HUB, {"resultType": "complete", **tool_failure(exc)}
        text = [{"type": "text", "text": json.dumps(shape)}]
        return ORIGIN_HUB, {"resultType": "complete", "content": text, "structuredContent": shape, "isError": False}

    def _spawn(self, asked: Json) -> Json:
        with self.spawning:  # calls come on several threads
            return self._spawn_one(asked)

    def _spawn_one(self, asked: Json) -> Json:
        key = asked.get("idempotency_key", "")
        if key in self.by_key:
            return self._shape(self.boxes[self.by_key[key]])
        run = self._open_run(asked["run"]) if "run" in asked else None
        if sum(not box.info.state.ended for box in self.boxes.values()) >= self.most:
            raise errors.CapacityExceeded("the twin is full", limit="hive", retry_after_seconds=0.05)
        recipe = asked.get("recipe", "general")
        if recipe not in self.recipes:
            raise errors.RecipeNotFound(f"there is no recipe {recipe!r}; there are: {', '.join(self.recipes)}")
        session = asked.get("session") or f"sb{len(self.boxes) + 1}"
        if any(box.info.session == session and not box.info.state.ended for box in self.boxes.values()):
            raise errors.SessionTaken(f"session {session!r} is taken")
        now = time.time()
        box_id = new_sandbox_id()
        info = SandboxInfo(
            id=box_id,
            session=SessionName(session),
            scope=Scope(""),
            recipe=recipe,
            state=State.READY,
            created_at=now,
            ready_at=now,
            expires_at=now + asked.get("ttl_seconds", 86_400),
            idle_seconds=asked.get("idle_seconds", 1800.0),
            labels=asked.get("labels", {}),
            network=asked.get("network", "internet"),
            run=run.info.name if run is not None else None,
            ports=tuple(asked.get("ports", ())),
        )
        workspace = self.root / box_id
        workspace.mkdir()
        runner = TwinRunner(workspace, {**asked.get("env", {}), **asked.get("secrets", {})})
        self.boxes[box_id] = TwinBox(info, runner)
        if key:
            self.by_key[key] = box_id
        return self._shape(self.boxes[box_id])

    def _run(self, asked: Json) -> Json:
        with self.spawning:
            if asked.get("renew"):
                run = self._open_run(asked.get("run_id") or asked["run"])
                run.renewals += 1
                return run_to_json(run.info)
            for run in self.runs.values():
                if run.is_open and run.info.name == asked["run"]:
                    if run.key != asked["idempotency_key"]:
                        raise errors.RunTaken("it is open", run=asked["run"], left_seconds=1.0)
                    return run_to_json(run.info)
            info = RunInfo(
                id=new_run_id(),
                name=asked["run"],
                scope=Scope(""),
                lease_seconds=asked["lease_seconds"],
                left_seconds=asked["lease_seconds"],
                opened_at=time.time(),
            )
            self.runs[info.id] = TwinRun(info, asked["idempotency_key"])
            return run_to_json(info)

    def _open_run(self, name: str) -> TwinRun:
        named = [run for run in self.runs.values() if name in (run.info.id, run.info.name)]
        if not named:
            raise errors.RunNotFound(f"there is no run {name!r}", run=name)
        if not named[-1].is_open:
            raise errors.RunEnded("it has ended; open another one", run=name, reason="run_ended")
        return named[-1]

    def end_run(self, run: TwinRun, reason: EndReason = EndReason.RUN_ENDED) -> list[TwinBox]:
        run.is_open = False
        ended = [box for box in self.boxes.values() if box.info.run == run.info.name and not box.info.state.ended]
        for box in ended:
            self.end(box, reason)
        return ended

    def _destroy(self, asked: Json) -> Json:
        if "run" in asked:
            ended = self.end_run(self._open_run(asked["run"]), EndReason.DESTROYED)
            shapes = [self._shape(box) for box in ended]
            return {"destroyed": shapes, "already_ended": [], "not_found": [], "run": asked["run"]}
        names: Any = asked["session"]
        if names == "*":
            names = [box.info.id for box in self.boxes.values() if not box.info.state.ended]
        answer: Json = {"destroyed": [], "already_ended": [], "not_found": []}
        for name in [names] if isinstance(names, str) else names:
            box = self._find(name)
            if box is None:
                answer["not_found"].append(name)
            elif box.info.state.ended:
                answer["already_ended"].append(self._shape(box))
            else:
                self.end(box, EndReason.DESTROYED)
                answer["destroyed"].append(self._shape(box))
        return answer

    def end(self, box: TwinBox, reason: EndReason) -> None:
        box.runner.close()
        box.info = dataclasses.replace(
            box.info, state=State.GONE, reason=reason, cause=Cause.AGENT, ended_at=time.time()
        )

    def _list(self, asked: Json) -> Json:
        wanted: Json = asked.get("labels") or {}
        found = [
            self._shape(box)
            for box in self.boxes.values()
            if asked.get("run") in (None, box.info.run)
            if (asked["include_ended"] or not box.info.state.ended) and wanted.items() <= dict(box.info.labels).items()
        ]
        return {"sandboxes": found, "runs": [run_to_json(run.info) for run in self.runs.values() if run.is_open]}

    def _network(self, asked: Json) -> Json:
        box = self._alive(asked["session"])
        box.info = dataclasses.replace(box.info, network=asked["policy"])
        return self._shape(box)

    def _extend(self, asked: Json) -> Json:
        box = self._alive(asked["session"])
        box.info = dataclasses.replace(box.info, expires_at=time.time() + asked["ttl_seconds"])
        return self._shape(box)

    def _share(self, asked: Json) -> Json:
        box = self._alive(asked["session"])
        action, token, revoked, ports = asked.get("action", "mint"), None, list[str](), tuple(asked.get("ports", ()))
        shown = box.shares
        if action == "mint":
            token = f"ashs_{len(box.shares)}_secret"
            expires_at = None if "ttl_seconds" not in asked else time.time() + asked["ttl_seconds"]
            if not set(ports) <= set(box.info.ports):
                raise errors.PortNotAllowed(f"there are {box.info.ports}")
            tools = tuple(asked.get("tool_names", [] if ports else [tool["name"] for tool in TOOLS]))
            made = ShareInfo(
                id=str(len(box.shares)), tools=tools, created_at=time.time(), expires_at=expires_at, ports=ports
            )
            box.shares.append(made)
            shown = [made]
        elif action == "revoke":
            revoked = asked.get("share_ids", [share.id for share in box.shares])
            unknown = set(revoked) - {share.id for share in box.shares}
            if unknown:
                raise errors.NotFound(f"there is no share {unknown}")
            box.shares = shown = [share for share in box.shares if share.id not in revoked]
        previews = [{"port": port, "url": f"http://{port}-x.localhost/?s={token}"} for port in ports]
        shape: Json = {"session": box.info.session, "sandbox_id": box.info.id, "token": token, "revoked": revoked}
        shape["previews"] = previews if self.has_previews else []
        return {**shape, "url": "http://hive.test/s/x/mcp", "shares": [share_to_json(share) for share in shown]}

    def _call(self, asked: Json) -> tuple[str, Json]:
        box = self._alive(asked["session"])
        tool, arguments = asked["tool"], asked["arguments"]
        if tool.startswith("ash_"):
            return ORIGIN_SANDBOX, {"resultType": "complete", **box.runner.call(tool, arguments)}
        if tool != TERMINAL:
            text = [{"type": "text", "text": f"Unknown tool: '{tool}'"}]
            return ORIGIN_SANDBOX, {"resultType": "complete", "content": text, "isError": True}
        done = box.runner.exec({"command": arguments["command"]})
        return ORIGIN_SANDBOX, {
            "resultType": "complete",
            "content": [{"type": "text", "text": done["stdout"]}],
            "structuredContent": done,
            "isError": done["exit_code"] != 0,
        }

    def _find(self, name: str) -> TwinBox | None:
        if name in self.boxes:
            return self.boxes[name]
        named = [box for box in self.boxes.values() if box.info.session == name]
        return named[-1] if named else None

    def _alive(self, name: str) -> TwinBox:
        box = self._find(name)
        if box is None:
            raise errors.SandboxNotFound(f"there is no sandbox {name!r}")
        if box.info.state.ended:
            raise errors.SandboxGone(f"sandbox {name!r} was destroyed; spawn a new one", reason=box.info.reason)
        return box

    @staticmethod
    def _shape(box: TwinBox) -> Json:
        return info_to_json(box.info, now=time.time())


def _ladder(request: httpx.Request, body: Json) -> httpx.Response | None:
    """Refuse what the MCP SDK's own server would refuse."""
    doubled = find_duplicated_routing_header(list(request.headers.items()))
    verdict = classify_inbound_request(body, headers=dict(request.headers))
    accepts = request.headers.get("accept", "")
    if doubled is None and not isinstance(verdict, InboundLadderRejection) and "text/event-stream" in accepts:
        return None
    error = {"code": -32020, "message": f"the twin refuses this request: {verdict} {doubled} {accepts}"}
    return httpx.Response(
        400, json={"jsonrpc": "2.0", "id": body["id"], "error": error}, headers={HEADER_ORIGIN: ORIGIN_HUB}
    )


def request_id(request: httpx.Request) -> Any:
    return json.loads(request.content)["id"]


def whole_answer(rpc_id: Any, result: Any, origin: str = ORIGIN_HUB) -> httpx.Response:
    return httpx.Response(
        200, json={"jsonrpc": "2.0", "id": rpc_id, "result": result}, headers={HEADER_ORIGIN: origin}
    )


def refusal(error: AshError, origin: str = ORIGIN_HUB) -> httpx.Response:
    """Answer as admission does: an HTTP status and a JSON body."""
    return httpx.Response(http_status(error), json={"error": failure_to_json(error)}, headers={HEADER_ORIGIN: origin})


def event(message: Any) -> bytes:
    return f"event: message\r\ndata: {json.dumps(message)}\r\n\r\n".encode()


def stream_answer(rpc_id: Any, result: Json, origin: str, token: Any) -> httpx.Response:
    """Answer with two pieces of progress first, cut where it hurts a careless reader."""

    def news(done: float, message: str) -> bytes:
        params = {"progressToken": token, "progress": done, "total": 2, "message": message}
        return event({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})

    whole = (
        b": hello\r\n\r\n"
        + news(1, "begun")
        + news(2, "nearly")
        + event({"jsonrpc": "2.0", "id": rpc_id, "result": result})
    )
    return raw_stream([whole[:7], whole[7:40], whole[40:-3], whole[-3:]], origin)


def raw_stream(
    pieces: Sequence[bytes | Exception], origin: str, *, nonce: str | None = None, then: anyio.Event | None = None
) -> httpx.Response:
    """Answer with a stream of exactly these pieces; an exception among them breaks it there.

    With `then` it stays open until that event.
    """

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece
        if then is not None:
            await then.wait()

    headers = {HEADER_ORIGIN: origin, "content-type": "text/event-stream"}
    if nonce is not None:
        headers[HEADER_NONCE] = nonce
    return httpx.Response(200, headers=headers, content=body())
