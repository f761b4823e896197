"""The claim: environment and secrets that a sandbox is given once, before its first call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, cast

import anyio
from starlette.types import Receive, Scope, Send

from ash_recipes.runner.answers import answer, body, refuse
from ash_recipes.runner.config import RunnerConfig
from ash_recipes.runner.context import Context, check_variables
from ash_recipes.runner.problems import Problem, refusal
from ash_recipes.runner.proof import unseal
from ash_recipes.runner.servers.base import RecipeServer

__all__ = ["MAX_CLAIM_BYTES", "Claims"]

MAX_CLAIM_BYTES: Final = 4 * 1024 * 1024


class Claims:
    """Takes the one claim of a sandbox, and answers the same again as the first.

    Args:
        server: The recipe's server, or why there is none.
        sealed: Whether others may read on the way, so that a claim must come sealed.
    """

    def __init__(self, config: RunnerConfig, context: Context, server: RecipeServer | str, *, sealed: bool) -> None:
        self._config = config
        self._context = context
        self._server = server
        self._sealed = sealed
        self._claiming = anyio.Lock()
        self._first: tuple[bytes, tuple[int, dict[str, Any]]] | None = None
        """The digest of the one claim, and its answer."""

    @property
    def is_awaited(self) -> bool:
        """Whether nobody is to be served yet: the sandbox is known to callers, and its claim has not come."""
        return self._config.claim_first and self._first is None

    async def take(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        try:
            more = self._variables(await body(receive, MAX_CLAIM_BYTES))
            check_variables(more)
        except Problem as exc:
            await answer(send, exc.http_status, exc.to_json())
            return
        digest = hashlib.sha256(json.dumps(more, sort_keys=True).encode()).digest()
        async with self._claiming:
            if self._first is None:
                self._first = digest, await self._apply(more)
            first, said = self._first
        if digest == first:
            await answer(send, *said)
        else:
            await refuse(send, 409, "conflict", "this sandbox has been claimed already, with something else")

    async def _apply(self, more: dict[str, str]) -> tuple[int, dict[str, Any]]:
        if isinstance(self._server, str):
            return 500, refusal("start_failed", self._server)
        self._context.environment.claim(more)
        try:
            await self._server.claimed(more)
        except Exception as exc:  # whatever a recipe's server fails with on its second start
            return 500, refusal("start_failed", f"the recipe's server did not start again: {exc}")
        return 200, {"claimed": True}

    def _variables(self, said: bytes) -> dict[str, str]:
        shape = _object(said)
        return _variables(_object(unseal(self._config, shape)) if self._sealed else shape)


def _object(said: bytes) -> dict[str, Any]:
    try:
        shape = json.loads(said)
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
