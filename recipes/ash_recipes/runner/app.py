"""The runner's ASGI app: the token check, the recipe's server at `/mcp`, and the private surface at `/_ash/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from ash_recipes.runner.answers import answer, header, refuse
from ash_recipes.runner.claims import Claims
from ash_recipes.runner.config import RunnerConfig
from ash_recipes.runner.context import Context
from ash_recipes.runner.file_door import FileDoor
from ash_recipes.runner.files import Files
from ash_recipes.runner.health import HEALTH_PATH, STARTING, Health
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.proof import NONCE_HEADER, PROOF_PATH, prove
from ash_recipes.runner.pty_door import TERMINAL_PATH, PtyDoor
from ash_recipes.runner.servers.base import RecipeServer

__all__ = ["RunnerApp"]

CLAIM_PATH: Final = "/_ash/claim"
FILES_PATH: Final = "/_ash/files"


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
        self._tokens = tokens
        self._server = server
        self._health = health
        self._claims = Claims(config, context, server, sealed=sealed)
        files = Files(context.workspace, kept=(context.workspace, context.home))
        self._doors: Mapping[str, ASGIApp] = {FILES_PATH: FileDoor(files, FILES_PATH)}
        """What is below a path of the private surface, the path itself included."""
        self._routes: Mapping[tuple[str, str], ASGIApp] = {
            (HEALTH_PATH, "GET"): self._tell_health,
            (PROOF_PATH, "GET"): self._prove,
            (CLAIM_PATH, "POST"): self._claims.take,
        }
        self._terminal = PtyDoor(context)

    def admits(self, token: bytes | None) -> bool:
        """Say whether a request with this `Ash-Token` may come in, past the claim."""
        return self._tokens.admits(token) and not self._claims.is_awaited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._open_websocket(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        route = self._routes.get((path, method))
        is_open = route is not None and path in (HEALTH_PATH, PROOF_PATH)
        if not is_open and not self._admits(scope):
            await refuse(send, 401, "unauthenticated", "a good Ash-Token is needed")
            return
        if self._claims.is_awaited and not is_open and path != CLAIM_PATH:
            await answer(send, 503, STARTING)
            return
        found = route or (self._mcp if path == "/mcp" else self._door_of(path))
        if found is not None:
            await found(scope, receive, send)
        elif any(known == path for known, _ in self._routes):
            await refuse(send, 405, "bad_request", f"{path} does not take {method}")
        else:
            await refuse(send, 404, "not_found", f"a runner has no {path}")

    def _admits(self, scope: Scope) -> bool:
        return self._tokens.admits(header(scope, b"ash-token"))

    def _door_of(self, path: str) -> ASGIApp | None:
        return next((door for at, door in self._doors.items() if path == at or path.startswith(f"{at}/")), None)

    async def _open_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == TERMINAL_PATH and self.admits(header(scope, b"ash-token")):
            await self._terminal(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.close", "code": 1008})

    async def _mcp(self, scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(self._server, str):
            await refuse(send, 500, "start_failed", self._server)
        else:
            await self._server(scope, receive, send)

    async def _tell_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        await answer(send, *self._health.answer(self._config, admitted=self._admits(scope)))

    async def _prove(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        try:
            await answer(send, 200, prove(self._config, header(scope, NONCE_HEADER)))
        except Problem as exc:
            await answer(send, exc.http_status, exc.to_json())
