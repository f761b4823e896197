"""Composition: opens the recipe's server and serves until the runner is told to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, cast

import uvicorn

from ash_recipes.runner import context as contexts
from ash_recipes.runner.app import RunnerApp
from ash_recipes.runner.canary import policy_problem
from ash_recipes.runner.config import ImageDefaults, RunnerConfig
from ash_recipes.runner.context import Context, Environment
from ash_recipes.runner.forwarder import forwarding, greeting, proxy_variables
from ash_recipes.runner.health import Health
from ash_recipes.runner.large_results import LargeResults
from ash_recipes.runner.listener import is_network
from ash_recipes.runner.ports import port_door
from ash_recipes.runner.processes import end_children
from ash_recipes.runner.servers.base import RecipeServer, StartProblem
from ash_recipes.runner.starting import StartingServer, polling_loop
from ash_recipes.runner.tokens import TokenCheck
from ash_recipes.runner.tools import RunnerTools
from ash_recipes.runner.users import reach_files_as, user_of_image

__all__ = ["Http", "open_server", "quieten", "run"]

USUAL_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Of commands of an image that sets none, as containers have it."""
RECIPE_FOLDER: Final = Path("/opt/recipe")
"""Where a recipe's own directory stands in a sandbox."""
GRACE_SECONDS: Final = 1
"""How long requests in flight may take once the runner is told to end; it is gone within two seconds."""
EXIT_SECONDS: Final = 1.8
"""After how long the process ends whatever still runs in it."""
WEBSOCKET_BYTES: Final = 1024 * 1024
"""The longest message on a WebSocket."""
HANDLER_SECONDS: Final = 0.1
"""How long the main thread has to end the process while it starts."""

log = logging.getLogger("ash_recipes.runner")


def run(
    config: RunnerConfig,
    listener: socket.socket,
    starting: StartingServer | None,
    gc_thresholds: tuple[int, int, int],
    context: Context | None = None,
) -> int:
    """Serve one sandbox and return the exit code.

    Args:
        starting: Answers until the recipe's server has started; None: nobody does, for all is imported already.
        gc_thresholds: Of the garbage collector, set once the recipe's server has started.
        context: The one that what is imported already knows; None: a new one.
    """
    signals = _SignalHandler()
    signals.install()
    signals.watch()
    quieten()
    with asyncio.Runner(loop_factory=polling_loop) as runner:
        runner.run(_serve(config, listener, starting, signals, gc_thresholds, context))
    end_children()
    return 0


def quieten() -> None:
    """Log to standard error, and not what says nothing to whoever reads a sandbox's log."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("mcp", "httpx2", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # What goes wrong on the way to a bridged server is the answer of the call that it happened to.
    logging.getLogger("mcp.client").setLevel(logging.CRITICAL)
    # The SDK warns at every log message of a tool; callers that understand them are still there.
    warnings.filterwarnings("ignore", message=".*deprecated as of 2026-07-28")


async def _serve(
    config: RunnerConfig,
    listener: socket.socket,
    starting: StartingServer | None,
    signals: _SignalHandler,
    gc_thresholds: tuple[int, int, int],
    known: Context | None,
) -> None:
    began = time.monotonic()
    context = _context(config)
    if known is not None:
        known.become(context)
        context = known
    contexts.install(context)
    network: Awaitable[str | None] | None = None
    if config.canary is not None:
        network = asyncio.get_running_loop().run_in_executor(None, policy_problem, config.canary)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(context.jobs)
        if config.egress:
            first = greeting(config.sandbox_id, config.egress_token) if config.egress_token else b""
            await stack.enter_async_context(forwarding(config.egress, first=first))
        server: RecipeServer | str
        try:
            server = await stack.enter_async_context(open_server(config, context))
        except StartProblem as exc:
            log.error("the recipe's server could not be started: %s", exc)
            server = str(exc)
        except Exception as exc:  # a recipe's own start-up code may fail with anything
            log.exception("the recipe's server could not be started")
            server = f"{type(exc).__name__}: {exc}"
        if network is not None and (policy_error := await network) is not None:
            log.error("%s", policy_error)
            server = policy_error
        health = Health("failed", server) if isinstance(server, str) else Health("ready")
        app = RunnerApp(config, context, TokenCheck.of(config), server, health, sealed=is_network(listener))
        signals.http = http = Http(app, context)
        signals.install()  # the recipe may have had its own mind about signals
        gc.freeze()  # what there is by now stays
        gc.set_threshold(*gc_thresholds)
        if starting is not None:
            starting.hand_over(health)
        log.info("serving recipe %s after %.2f s", config.recipe or "without a name", time.monotonic() - began)
        await http.serve(sockets=[listener])


def _context(config: RunnerConfig) -> Context:
    os.environ["HOME"] = str(config.home)
    if config.egress:
        os.environ.update(proxy_variables())
    os.environ.update(config.env)
    if config.image is not None:
        return _context_of_image(config, config.image)
    context = Context(
        workspace=config.workspace,
        home=config.home,
        network_note=config.network_note,
        environment=Environment(os.environ),
    )
    os.chdir(config.workspace)
    return context


def _context_of_image(config: RunnerConfig, image: ImageDefaults) -> Context:
    """Return the context of a runner that is a guest in an image: commands have what the image gives them."""
    user = user_of_image(image.user)
    config.workspace.mkdir(parents=True, exist_ok=True)
    if not image.has_workdir:
        os.chown(config.workspace, user.uid, user.gid)
    variables = {"PATH": USUAL_PATH, "TERM": os.environ.get("TERM", "dumb"), "HOME": user.home, **image.env}
    is_other = (user.uid, user.gid) != (os.geteuid(), os.getegid())
    if is_other:
        reach_files_as(user)
    context = Context(
        workspace=config.workspace,
        home=Path(user.home),
        network_note=config.network_note,
        user=user if is_other else None,
        environment=Environment({**variables, **(proxy_variables() if config.egress else {}), **config.env}),
    )
    os.chdir(config.workspace)
    return context


@asynccontextmanager
async def open_server(config: RunnerConfig, context: Context) -> AsyncGenerator[RecipeServer]:
    """Start the recipe's server in the way that the configuration says.

    Raises:
        StartProblem: It does not start.
    """
    results = LargeResults(config.result_bytes, context.results, config.sandbox_id)
    tools = RunnerTools(context, results)
    folder = RECIPE_FOLDER if RECIPE_FOLDER.is_dir() else None
    ways = [way for way in ("python", "http", "stdio") if config.server.get(way)]
    if len(ways) != 1:
        raise StartProblem("server says none or several of python, http and stdio; say one")
    asked: Any = config.server[ways[0]]
    if ways == ["python"]:
        from ash_recipes.runner.servers.python import open_python

        opening = open_python(str(asked), tools, folder)
    else:
        from ash_recipes.runner.servers.command import open_http, open_stdio

        opening = (open_http if ways == ["http"] else open_stdio)(asked, context, tools, folder)
    async with opening as server:
        yield server


class Http(uvicorn.Server):
    """Ends every command of the sandbox as soon as it is told to end, and itself soon after."""

    def __init__(self, app: RunnerApp, context: Context) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws=cast("Any", port_door(app.admits, _websocket)),
                ws_max_size=WEBSOCKET_BYTES,
                ws_per_message_deflate=False,
                http="httptools" if _has_httptools() else "h11",
                loop="none",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                date_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=GRACE_SECONDS,
                h11_max_incomplete_event_size=65_536,
            )
        )
        self._context = context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = asyncio.Event()

    async def main_loop(self) -> None:
        """Wait to be told to end; uvicorn's own loop looks ten times a second, also in an idle sandbox."""
        self._loop = asyncio.get_running_loop()
        if not await self.on_tick(0):  # which also sets the headers of answers
            await self._told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, without its tenth of a second where nothing is in flight: each destroy waits for this."""
        if not self.server_state.tasks:
            for server in self.servers:
                server.close()
            for connection in list(self.server_state.connections):
                connection.shutdown()
            await asyncio.sleep(0)  # in which the idle ones are gone
        if self.server_state.tasks or self.server_state.connections:
            await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave them to `_SignalHandler`, which has them before and after, too."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._context.jobs.end_all()
        signal.signal(signal.SIGALRM, _end_now)
        signal.setitimer(signal.ITIMER_REAL, EXIT_SECONDS)
        super().handle_exit(sig, frame)
        if self._loop is not None:  # a handler of Python's does not end the loop's wait by itself
            with suppress(RuntimeError):  # the loop has ended, and what is left of the process is ended just now
                self._loop.call_soon_threadsafe(self._told.set)

    def end(self) -> None:
        """Have `serve` return soon; from its own loop, with no command running."""
        self.should_exit = True
        self._told.set()


class _SignalHandler:
    """Handles SIGTERM and SIGINT: ends the HTTP server, or, before there is one, the process."""

    http: Http | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def watch(self) -> None:
        """Have a thread end the process where the main one does not.

        A handler of Python runs between two steps of the main thread, so never while a recipe that is imported waits
        in a system call that the signal came just too early to interrupt.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), name="ending", daemon=True).start()

    def _watch(self, reading: int) -> None:
        while (number := os.read(reading, 1)[0]) not in (signal.SIGTERM, signal.SIGINT):
            pass
        time.sleep(HANDLER_SECONDS if self.http is None else EXIT_SECONDS)
        _end_now(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.http is None:
            _end_now(number, frame)
        else:
            self.http.handle_exit(number, frame)


def _end_now(number: int, frame: FrameType | None) -> None:
    end_children()
    os._exit(0)


def _websocket(**given: Any) -> asyncio.Protocol:
    """Return uvicorn's protocol of one WebSocket; most sandboxes never import it."""
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    return WebSocketsSansIOProtocol(**given)


def _has_httptools() -> bool:
    try:
        import httptools  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return True
