"""Starting a sandbox: create, wait until it answers, pin its tools.

A pool does it ahead, a spawn at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from ash_hub.backends.base import Backend, Instance
from ash_hub.pool import Blank
from ash_hub.recipes import Recipe
from ash_hub.runner_client import RunnerClient
from ash_hub.tools import pin
from ash_hub.watching import InstanceWatch
from ash_mcp.errors import AshError, CapacityExceeded, ConfigError, RequestRefused, StartFailed
from ash_mcp.types import SandboxId, SandboxSpec
from ash_router.tokens import CallTokens

__all__ = ["Progress", "Starter"]

CLEANUP_SECONDS: Final = 15.0
LOG_TAIL_BYTES: Final = 4096

Progress = Callable[[float, str], Awaitable[None]]
"""Told the share of a start that is done (0 to 1) and what happens now."""


class Starter:
    """Starts sandboxes, a bounded number at once.

    Args:
        at_once: How many may be starting.
        waiting: How many may wait for that; one more is refused.
    """

    def __init__(
        self, backend: Backend, watch: InstanceWatch, tokens: CallTokens, *, at_once: int, waiting: int
    ) -> None:
        self._backend = backend
        self._watch = watch
        self._tokens = tokens
        self._slots = anyio.CapacityLimiter(at_once)
        self._waiting = waiting

    def client(self, instance: Instance) -> RunnerClient:
        assert instance.endpoint is not None, "only a running instance has an endpoint"
        return RunnerClient(instance.endpoint, self._tokens, instance.id, instance.generation)

    async def start(self, recipe: Recipe, spec: SandboxSpec, progress: Progress) -> Blank:
        """Return a started sandbox with its tools pinned. On any failure nothing of it is left.

        Raises:
            StartFailed: With the step that failed and the last lines of the sandbox's log.
            CapacityExceeded: Too many spawns wait already.
            ConfigError: The backend cannot make what the spec asks for.
        """
        if self._slots.statistics().tasks_waiting >= self._waiting:
            raise CapacityExceeded("too many spawns wait for a start already", retry_after_seconds=5.0)
        async with self._slots:
            await progress(0.1, "creating")
            async with self._step("create", spec.id):
                instance = await self._backend.create(spec)
            await progress(0.3, "starting its MCP server")
            async with self._step("start", spec.id):
                instance = await self._running(instance, recipe.start_timeout_seconds)
                async with self._watch.while_alive(spec.id):
                    await self.client(instance).wait_ready(recipe.start_timeout_seconds)
            await progress(0.8, "reading its tools")
            async with self._step("tools", spec.id), self._watch.while_alive(spec.id):
                listed = await self.client(instance).list_tools(recipe.start_timeout_seconds)
                toolset = pin(listed, recipe.tools)
            return Blank(instance, toolset)

    async def claim(self, blank: Blank, env: Mapping[str, str], secrets: Mapping[str, str]) -> None:
        """Make a blank somebody's. On failure nothing of it is left."""
        async with self._step("claim", blank.instance.id), self._watch.while_alive(blank.instance.id):
            await self.client(blank.instance).claim(env, secrets, timeout_seconds=60.0)

    async def discard(self, sandbox_id: SandboxId) -> None:
        """Remove a sandbox, also while the caller is being cancelled; bounded."""
        with anyio.move_on_after(CLEANUP_SECONDS, shield=True):
            await self._backend.delete(sandbox_id, grace_seconds=0.0)

    async def _running(self, instance: Instance, timeout_seconds: float) -> Instance:
        if instance.endpoint is not None:
            return instance
        with anyio.fail_after(timeout_seconds):
            async for event in self._backend.watch():
                changed = event.instance
                if changed is not None and changed.id == instance.id and changed.endpoint is not None:
                    return changed
        raise StartFailed("the backend stopped watching before the sandbox ran")

    @asynccontextmanager
    async def _step(self, name: str, sandbox_id: SandboxId) -> AsyncGenerator[None]:
        try:
            yield
        except RequestRefused:
            await self.discard(sandbox_id)
            raise
        except ConfigError:
            await self.discard(sandbox_id)
            raise
        except (AshError, TimeoutError) as exc:
            log = await self._log_tail(sandbox_id)
            await self.discard(sandbox_id)
            data: dict[str, Any] = {"step": name, "log": log or None}
            if isinstance(exc, StartFailed):
                data = {**data, **exc.data}
            said = str(exc) or "it took too long"
            tail = f"\nLast lines of its log:\n{log}" if log else ""
            raise StartFailed(f"the sandbox did not start (step {name}): {said}{tail}", **data) from exc
        except BaseException:
            await self.discard(sandbox_id)
            raise

    async def _log_tail(self, sandbox_id: SandboxId) -> str:
        with anyio.move_on_after(2.0):
            raw = await self._backend.logs(sandbox_id, tail_bytes=LOG_TAIL_BYTES)
            return "\n".join(raw.decode(errors="replace").splitlines()[-20:])
        return ""
