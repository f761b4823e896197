"""Starting a sandbox: create, wait until it answers, pin its tools.

A pool does it ahead, a spawn at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import anyio
import anyio.to_thread

from ash_hub.backends.base import Backend, Instance
from ash_hub.spawning.instance_watch import InstanceWatch
from ash_hub.spawning.pool import Started
from ash_hub.spawning.recipes import Recipe
from ash_hub.spawning.runner_client import RunnerClient
from ash_hub.spawning.sandbox_requests import SandboxRequests
from ash_hub.spawning.server_client import ServerClient
from ash_hub.spawning.start_turns import StartTurns
from ash_hub.spawning.toolsets import pin
from ash_mcp.errors import AshError, ConfigError, RequestRefused, StartFailed
from ash_mcp.types import SandboxId, SandboxSpec
from ash_router.bounds.effective_limits import EffectiveLimit
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["Progress", "Starter"]

LOG_TAIL_BYTES: Final = 4096

Progress = Callable[[float, str], Awaitable[None]]
"""Told the share of a start that is done (0 to 1) and what happens now."""


@dataclass(slots=True)
class _At:
    """How far a start has come."""

    step: str


class Starter:
    """Starts sandboxes, a bounded number at once. What a failed start leaves is the controller's to remove.

    Args:
        at_once: How many may be starting.
        waiting: How many may wait for that; more are refused, to each owner what is beyond an equal share.
    """

    def __init__(
        self, backend: Backend, watch: InstanceWatch, tokens: CallTokens, *, at_once: int, waiting: int
    ) -> None:
        self._backend = backend
        self._watch = watch
        self._tokens = tokens
        self._turns = StartTurns(at_once=at_once, waiting=waiting)
        self._pinning = anyio.CapacityLimiter(1)  # more threads would only take turns with the loop's

    def client(self, instance: Instance) -> SandboxRequests:
        assert instance.endpoint is not None, "only a running instance has an endpoint"
        if instance.endpoint.has_runner:
            return RunnerClient(instance.endpoint, self._tokens, instance.id)
        return ServerClient(instance.endpoint, self._tokens.sandbox_keys, instance.id, self._backend.unready)

    async def start(
        self,
        owner: str,
        recipe: Recipe,
        spec: Callable[[], SandboxSpec],
        progress: Progress,
        waiting: EffectiveLimit | None = None,
    ) -> Started:
        """Return a started sandbox with its tools pinned, once it is its owner's turn.

        Args:
            spec: Asked when it is; what it returns is created.

        Raises:
            StartFailed: With the step that failed and the last lines of the sandbox's log.
            CapacityExceeded: Too many spawns wait already.
            ConfigError: The backend cannot make what the spec asks for.
        """
        async with self._turns.turn(owner, waiting):
            await progress(0.1, "creating")
            made = spec()
            async with self._explained("create", made.id) as at, self._watch.start_of(made.id) as news:
                news.tell(await self._backend.create(made))
                await progress(0.3, "starting its MCP server")
                at.step = "start"
                instance = await news.running(recipe.start_timeout_seconds, lambda waits: progress(0.3, waits))
                await self.client(instance).wait_ready(recipe.start_timeout_seconds)
                await progress(0.8, "reading its tools")
                at.step = "tools"
                listed = await self.client(instance).list_tools(recipe.start_timeout_seconds)
                toolset = await anyio.to_thread.run_sync(pin, listed, recipe.tools, limiter=self._pinning)
            return Started(instance, toolset)

    async def claim(self, started: Started, env: Mapping[str, str], secrets: Mapping[str, str]) -> None:
        """Make a started sandbox somebody's. One without a runner has been given its environment at its creation."""
        sandbox_id, client = started.instance.id, self.client(started.instance)
        if not isinstance(client, RunnerClient):
            return
        async with self._explained("claim", sandbox_id), self._watch.start_of(sandbox_id) as news:
            news.tell(started.instance)
            await client.claim(env, secrets, timeout_seconds=60.0)

    @asynccontextmanager
    async def _explained(self, step: str, sandbox_id: SandboxId) -> AsyncGenerator[_At]:
        at = _At(step)
        try:
            yield at
        except (RequestRefused, ConfigError):
            raise
        except (AshError, TimeoutError) as exc:
            log = await self._log_tail(sandbox_id)
            data: dict[str, Any] = {"step": at.step, "log": log or None}
            if isinstance(exc, StartFailed):
                data = {**data, **exc.data}
            said = str(exc) or "it took too long"
            tail = f"\nLast lines of its log:\n{log}" if log else ""
            raise StartFailed(f"the sandbox did not start (step {at.step}): {said}{tail}", **data) from exc

    async def _log_tail(self, sandbox_id: SandboxId) -> str:
        with anyio.move_on_after(2.0), suppress(AshError):
            raw = await self._backend.logs(sandbox_id, tail_bytes=LOG_TAIL_BYTES)
            return "\n".join(raw.decode(errors="replace").splitlines()[-20:])
        return ""
