"""The runner's ASGI app: the token check, the recipe's server at `/mcp`, and the private surface at `/_ash/`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, Protocol, cast
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
from starlette.types import Receive, Scope, Send

from ash_recipes.runner.config import RunnerConfig
from ash_recipes.runner.context import Context, check_variables
from ash_recipes.runner.files import Files
from ash_recipes.runner.health import HEALTH_PATH, STARTING, Health
from ash_recipes.runner.problems import Problem, refusal
from ash_recipes.runner.proof import NONCE_HEADER, PROOF_PATH, prove, unseal
from ash_recipes.runner.servers.base import RecipeServer

__all__ = ["RunnerApp"]

PIECE_BYTES: Final = 262_144
CLAIM_PATH: Final = "/_ash/claim"
MAX_CLAIM_BYTES: Final = 4 * 1024 * 1024


class Tokens(Protocol):
    def admits(self, token: bytes | None) -> bool: ...


class RunnerApp:
    """Answers every request of a sandbox.

    Args:
        server: The recipe's server, or why there is none.
        sealed: Whether others may read on the way, so that a claim must come sealed.
    """

    def __init__(
        self,
        config: RunnerConfig,
        context: Context,
        tokens: Tokens,
        server: RecipeServer | str,
        health: Health,
        *,
        sealed: bool,
    ) -> None:
        self._config = config
        self._context = context
        self._tokens = tokens
        self._server = server
        self._health = health
        self._sealed = sealed
        self._files = Files(context.workspace)
        self._claiming = anyio.Lock()
        self._claim: tuple[bytes, tuple[int, dict[str, Any]]] | None = None
        """The digest of the one claim, and its answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        path: str = scope["path"]
        admitted = self._tokens.admits(_header(scope, b"ash-token"))
        if (path, scope["method"]) == (HEALTH_PATH, "GET"):
            await _answer(send, *self._health.answer(self._config, admitted=admitted))
            return
        if (path, scope["method"]) == (PROOF_PATH, "GET"):
            await self._prove(scope, send)
            return
        if not admitted:
            await _refuse(send, 401, "unauthenticated", "a good Ash-Token is needed")
            return
        if self._config.claim_first and self._claim is None and path != CLAIM_PATH:
            await _answer(send, 503, STARTING)
            return
        if path == "/mcp":
            await self._mcp(scope, receive, send)
            return
        route = _ROUTES.get((path, scope["method"]))
        if route is not None:
            await getattr(self, route)(scope, receive, send)
        elif path in (HEALTH_PATH, PROOF_PATH) or any(known == path for known, _ in _ROUTES):
            await _refuse(send, 405, "bad_request", f"{path} does not take {scope['method']}")
        else:
            await _refuse(send, 404, "not_found", f"a runner has no {path}")

    async def _mcp(self, scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(self._server, str):
            await _refuse(send, 500, "start_failed", self._server)
        else:
            await self._server(scope, receive, send)

    async def _prove(self, scope: Scope, send: Send) -> None:
        try:
            await _answer(send, 200, prove(self._config, _header(scope, NONCE_HEADER)))
        except Problem as exc:
            await _answer(send, exc.http_status, exc.to_json())

    async def _take_claim(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            more = self._claimed_variables(await _body(receive, MAX_CLAIM_BYTES))
            check_variables(more)
        except Problem as exc:
            await _answer(send, exc.http_status, exc.to_json())
            return
        digest = hashlib.sha256(json.dumps(more, sort_keys=True).encode()).digest()
        async with self._claiming:
            if self._claim is None:
                self._claim = digest, await self._apply(more)
            first, answer = self._claim
        if digest == first:
            await _answer(send, *answer)
        else:
            await _refuse(send, 409, "conflict", "this sandbox has been claimed already, with something else")

    async def _apply(self, more: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if isinstance(self._server, str):
            return 500, refusal("start_failed", self._server)
        self._context.environment.claim(more)
        try:
            await self._server.claimed(more)
        except Exception as exc:  # whatever a recipe's server fails with on its second start
            return 500, refusal("start_failed", f"the recipe's server did not start again: {exc}")
        return 200, {"claimed": True}

    def _claimed_variables(self, body: bytes) -> dict[str, str]:
        shape = _object(body)
        return _variables(_object(unseal(self._config, shape)) if self._sealed else shape)

    async def _get_file(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            file = await anyio.to_thread.run_sync(self._files.open, _path(scope))
        except Problem as exc:
            await _answer(send, exc.http_status, exc.to_json())
            return
        with file:
            size = file.seek(0, 2)
            file.seek(0)
            await _start(send, 200, b"application/octet-stream", size)
            left = size
            while left > 0:
                piece = await anyio.to_thread.run_sync(file.read, min(PIECE_BYTES, left))
                if not piece:  # the file has shrunk: the length was promised, so the answer must break off
                    raise ConnectionAbortedError("a file became shorter while it was read")
                left -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _put_file(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            upload = await anyio.to_thread.run_sync(self._files.upload, _path(scope))
            try:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    await anyio.to_thread.run_sync(upload.write, message.get("body", b""))
                    if not message.get("more_body"):
                        break
                written = await anyio.to_thread.run_sync(upload.finish)
            finally:
                upload.abandon()
        except Problem as exc:
            await _answer(send, exc.http_status, exc.to_json())
            return
        await _answer(send, 200 if upload.existed else 201, {"bytes": written})


_ROUTES: Mapping[tuple[str, str], str] = {
    (CLAIM_PATH, "POST"): "_take_claim",
    ("/_ash/files", "GET"): "_get_file",
    ("/_ash/files", "PUT"): "_put_file",
}


def _header(scope: Scope, name: bytes) -> bytes | None:
    found = [value for key, value in scope["headers"] if key == name]
    return found[0] if len(found) == 1 else None


def _path(scope: Scope) -> str:
    # Bytes that are not UTF-8 become what Python uses for them in file names.
    query = parse_qs(scope["query_string"].decode("latin-1"), errors="surrogateescape", max_num_fields=8)
    paths = query.get("path", [])
    if len(paths) != 1:
        raise Problem("bad_request", "say one path: /_ash/files?path=…")
    return paths[0]


async def _body(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            raise Problem("bad_request", f"the body is larger than {limit} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        shape = json.loads(body)
    except (ValueError, RecursionError):
        raise Problem("bad_request", "the body of a claim is a JSON object") from None
    if not isinstance(shape, dict):
        raise Problem("bad_request", "the body of a claim is a JSON object")
    return cast("dict[str, Any]", shape)


def _variables(shape: Mapping[str, Any]) -> dict[str, str]:
    more: dict[str, str] = {}
    for part in ("env", "secrets"):
        given: Any = shape.get(part, {})
        if not isinstance(given, dict):
            raise Problem("bad_request", f"{part} is an object of strings")
        for name, value in cast("dict[str, Any]", given).items():
            if not isinstance(value, str):
                raise Problem("bad_request", f"the value of {name!r} in {part} is not a string")
            more[name] = value
    return more


async def _start(send: Send, status: int, content_type: bytes, length: int) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _answer(send: Send, status: int, shape: Any) -> None:
    body = json.dumps(shape).encode()
    await _start(send, status, b"application/json", len(body))
    await send({"type": "http.response.body", "body": body})


async def _refuse(send: Send, status: int, kind: str, message: str) -> None:
    await _answer(send, status, refusal(kind, message))
