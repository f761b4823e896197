"""A hive in the foreground: from its first line to a graceful end."""

from __future__ import annotations

import os
import signal
import sys
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import anyio
import anyio.abc
import typer

from ash_hub.app import Hive, open_hive
from ash_hub.cli.banner import banner, host_lines
from ash_hub.cli.demo import walk
from ash_hub.router_alone import Router, open_router
from ash_hub.seed_router import open_seed_router
from ash_hub.serving import logs
from ash_hub.settings import HubSettings
from ash_mcp.cli.context import INTERRUPTED, fail, run_async
from ash_mcp.cli.output import note, say
from ash_mcp.errors import ConfigError
from ash_router.bounds import epoll_watches

__all__ = ["run_hive", "run_router"]


def run_hive(settings: HubSettings, *, demo: bool) -> int:
    """Serve until a signal comes, the hive is told to stop or, after a demo, nobody is there; return the exit code."""
    _set_up_logs(settings, to_stderr=not demo and not sys.stderr.isatty())
    return _run(lambda: _Service(settings, demo=demo))


def run_router(settings: HubSettings, *, seed_routes: bool = False) -> int:
    """Serve a router, of the hives' routes or of the seed's, until a signal comes; return the exit code."""
    _set_up_logs(settings, to_stderr=not sys.stderr.isatty())
    return _run(lambda: _RouterService(settings, open_seed_router if seed_routes else open_router))


def _set_up_logs(settings: HubSettings, *, to_stderr: bool) -> None:
    try:
        logs.set_up(settings.logs, settings.log_level, to_stderr=to_stderr)
    except OSError as exc:
        raise typer.BadParameter(
            f"{settings.logs} cannot hold the log: {exc.strerror}; set ASH_HUB_STATE_DIR, or ASH_HUB_LOG_DIR alone"
        ) from exc


def _run(make: Callable[[], _Foreground]) -> int:
    codes: list[int] = []
    try:
        epoll_watches.require_room()
    except OSError as exc:  # uvloop would abort
        said = f"the kernel lets this user watch no more descriptors: {exc.strerror}"
        fail(
            ConfigError(f"{said}. End the process that holds them, or raise fs.epoll.max_user_watches"), as_json=False
        )

    async def serve() -> None:
        codes.append(await make().run())

    run_async(serve, use_uvloop=_has_uvloop())
    return codes[0]


def _has_uvloop() -> bool:
    from importlib.util import find_spec

    return find_spec("uvloop") is not None


class _Foreground:
    """Something that serves until a signal comes."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._leave = anyio.Event()
        self._opening = anyio.CancelScope()
        self._opened = False
        self.exit_code = 0

    async def run(self) -> int:
        """Serve until the end and return the exit code."""
        async with anyio.create_task_group() as group:
            await group.start(self._obey_signals)
            with self._opening:
                await self._open_and_serve()
            if not self._opened:
                self.exit_code = INTERRUPTED
            group.cancel_scope.cancel()
        return self.exit_code

    @abstractmethod
    async def _open_and_serve(self) -> None:
        """Open it, say so in `_opened`, and serve until `_leave`."""

    async def _obey_signals(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Leave gracefully at the first signal, at once at the second: then the keeper ends what runs."""
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                if self._leave.is_set():
                    os._exit(128 + number)
                self._leave.set()
                if not self._opened:
                    self._opening.cancel()


class _RouterService(_Foreground):
    def __init__(
        self, settings: HubSettings, opening: Callable[[HubSettings], AbstractAsyncContextManager[Router]]
    ) -> None:
        super().__init__(settings)
        self._router = opening

    async def _open_and_serve(self) -> None:
        async with self._router(self._settings) as router:
            self._opened = True
            say(f"Ash routes at {router.url}")
            await self._leave.wait()


class _Service(_Foreground):
    def __init__(self, settings: HubSettings, *, demo: bool) -> None:
        super().__init__(settings)
        self._demo = demo

    async def _open_and_serve(self) -> None:
        async with open_hive(self._settings) as hive:
            self._opened = True
            await self._serve(hive)

    async def _serve(self, hive: Hive) -> None:
        for line in banner(hive) if self._demo else [*banner(hive), *host_lines(hive.url)]:
            say(line)
        async with anyio.create_task_group() as group:
            group.start_soon(_then_cancel, self._leave.wait, group.cancel_scope)
            group.start_soon(_then_cancel, hive.stopped, group.cancel_scope)
            if self._demo and await self._show(hive):
                group.cancel_scope.cancel()
        note("Stopping…" if self._settings.keeps else "Stopping; ending what runs…")

    async def _show(self, hive: Hive) -> bool:
        """Walk through the main job; return whether the hive shall end after it, as nobody sits there."""
        went_well = await walk(hive.url, say)
        for line in host_lines(hive.url):
            say(line)
        if sys.stdin and sys.stdin.isatty():
            say("Serving until Ctrl-C.")
            return False
        self.exit_code = 0 if went_well else 1
        return True


async def _then_cancel(wait: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
    await wait()
    scope.cancel()
