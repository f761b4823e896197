"""Starting a sandbox: create, wait until it answers, pin its tools.

A pool does it ahead, a spawn at once.
"""

from __future__ import annotations

import hashlib
import json
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
from ash_hub.spawning.toolsets import Toolset, pin
from ash_mcp.errors import AshError, ConfigError, RequestRefused, StartFailed
from ash_mcp.types import Endpoint, SandboxId, SandboxSpec
from ash_router.bounds.effective_limits import EffectiveLimit
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["CLAIM_SECONDS", "Handover", "Progress", "Starter"]

LOG_TAIL_BYTES: Final = 4096
CLAIM_SECONDS: Final = 60.0
MOST_KNOWN: Final = 64
"""Toolsets that are known before a start."""

Progress = Callable[[float, str], Awaitable[None]]
"""Told the share of a start that is done (0 to 1) and what happens now."""


@dataclass(frozen=True, slots=True)
class Handover:
    """What a sandbox gets when it becomes somebody's."""

    env: Mapping[str, str]
    secrets: Mapping[str, str]


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
        self._toolsets: dict[tuple[str, str], Toolset] = {}
        """Those of servers that are copies of each other, with what their recipe says of tools; the oldest first."""
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
        handover: Handover | None = None,
        toolset: Toolset | None = None,
    ) -> Started:
        """Return a started sandbox with its tools pinned, once it is its owner's turn.

        Args:
            spec: Asked when it is; what it returns is created.
            handover: What it is claimed with, after its tools are known; None: that is done later.
            toolset: Its tools, where they are known, as of a snapshot; None: it is asked for them.

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
                toolset = toolset or self._known_toolset(instance, recipe)
                if toolset is None or handover is None or instance.copy_of is None:
                    await self.client(instance).wait_ready(recipe.start_timeout_seconds)
                if toolset is None:
                    await progress(0.8, "reading its tools")
                    at.step = "tools"
                    toolset = await self._pinned(instance, recipe)
                started = Started(instance, toolset)
                if handover is not None:
                    await progress(0.9, "handing over the environment")
                    at.step = "claim"
                    await self._claim(started, handover)
            return started

    async def restart(
        self,
        owner: str,
        sandbox_id: SandboxId,
        endpoint: Endpoint,
        work: Callable[[], Awaitable[None]],
        env: Mapping[str, str],
        secrets: Mapping[str, str],
        *,
        timeout_seconds: float,
        waiting: EffectiveLimit | None = None,
    ) -> None:
        """Have a sandbox started anew by `work`, once it is its owner's turn, and make it somebody's again.

        Raises:
            StartFailed: It did not come up, or may not have.
            RequestRefused: As `work` does, and nothing was done.
        """
        async with self._turns.turn(owner, waiting), self._explained("restart", sandbox_id) as at:
            await work()
            client = RunnerClient(endpoint, self._tokens, sandbox_id)
            at.step = "start"
            await client.wait_ready(timeout_seconds)
            at.step = "claim"
            await client.claim(env, secrets, timeout_seconds=timeout_seconds)

    def _known_toolset(self, instance: Instance, recipe: Recipe) -> Toolset | None:
        """Return the toolset of what this server is a copy of: as another copy listed it before that was claimed."""
        return None if instance.copy_of is None else self._toolsets.get((instance.copy_of, _digest_of(recipe)))

    async def _pinned(self, instance: Instance, recipe: Recipe) -> Toolset:
        listed = await self.client(instance).list_tools(recipe.start_timeout_seconds)
        toolset = await anyio.to_thread.run_sync(pin, listed, recipe.tools, limiter=self._pinning)
        if instance.copy_of is not None:
            while len(self._toolsets) >= MOST_KNOWN:
                del self._toolsets[next(iter(self._toolsets))]
            self._toolsets[instance.copy_of, _digest_of(recipe)] = toolset
        return toolset

    async def claim(self, started: Started, handover: Handover) -> None:
        """Make a started sandbox somebody's, of which nothing was handed over yet."""
        sandbox_id = started.instance.id
        async with self._explained("claim", sandbox_id), self._watch.start_of(sandbox_id) as news:
            news.tell(started.instance)
            await self._claim(started, handover)

    async def _claim(self, started: Started, handover: Handover) -> None:
        client = self.client(started.instance)
        if isinstance(client, RunnerClient):  # one without was given its environment at its creation
            await client.claim(handover.env, handover.secrets, timeout_seconds=CLAIM_SECONDS)

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


def _digest_of(recipe: Recipe) -> str:
    return hashlib.sha256(json.dumps(recipe.tools, sort_keys=True, default=str).encode()).hexdigest()
