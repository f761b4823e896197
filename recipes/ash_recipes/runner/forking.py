"""A runner that is forked: all that its sandboxes have in common is loaded and warm before the first of them exists.

`load` runs once, in the process that is forked; `main` in each that is forked from it, which by then is behind the
walls of its own sandbox and has its own environment. Nothing of a sandbox is here before the fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ash_recipes.runner import __main__ as start
from ash_recipes.runner import context as contexts
from ash_recipes.runner import own_memory, service, starting, tokens
from ash_recipes.runner.app import RunnerApp
from ash_recipes.runner.config import ConfigProblem, Listen, RunnerConfig, take_from
from ash_recipes.runner.context import Context, Environment
from ash_recipes.runner.health import Health
from ash_recipes.runner.listener import open_listener
from ash_recipes.runner.servers.base import StartProblem
from ash_recipes.runner.servers.python import keep_loaded

__all__ = ["load", "main"]

_WARM_SECONDS: Final = 20.0
_MODERN, _LEGACY = "2026-07-28", "2025-06-18"
_CLIENT = {"name": "ash-warm", "version": "0"}

_collecting = gc.get_threshold()
_kept: list[Context] = []


def load(given: Mapping[str, Any]) -> str | None:
    """Import a recipe, build its server, and have it answer a list and a call in both eras.

    Args:
        given: `server`, `env`, `workspace` and `home`, as in `ASH_RUNNER_CONFIG`.

    Returns:
        Why it cannot be forked, or None.
    """
    target = given["server"].get("python")
    if target is None:
        return "its server is a command, not a Python object"
    gc.set_threshold(20_000, 50, 100)
    os.environ.update(given["env"])
    os.environ["HOME"] = given["home"]
    context = Context(
        workspace=Path(given["workspace"]), home=Path(given["home"]), environment=Environment(os.environ)
    )
    contexts.install(context)
    _kept.append(context)
    service.quieten()
    try:
        keep_loaded(target, service.RECIPE_FOLDER if service.RECIPE_FOLDER.is_dir() else None)
    except StartProblem as problem:
        return str(problem)
    logging.disable(logging.WARNING)
    try:
        with asyncio.Runner(loop_factory=starting.polling_loop) as runner:
            runner.run(_warm(target, context))
    except Exception as problem:  # whatever a recipe's own code fails with
        return f"it could not be warmed: {type(problem).__name__}: {problem}"
    finally:
        logging.disable(logging.NOTSET)
    return None


def main() -> int:
    """Serve the sandbox that this process's environment describes, and return the exit code."""
    own_memory.close_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, start.end_at_once)
    try:
        config = take_from(os.environ)
        listener = open_listener(config)
    except ConfigProblem as exc:
        sys.stderr.write(f"runner: {exc}\n")
        return 2
    return service.run(config, listener, None, _collecting, _kept[0])


async def _warm(target: str, context: Context) -> None:
    place = context.home / ".warm"
    config = RunnerConfig(
        listen=Listen(descriptor=0), server={"python": target}, workspace=context.workspace, home=context.home
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()

        async with context.jobs, service.open_server(config, context) as server:
            check = tokens.TokenCheck("", sandbox_id="")
            app = RunnerApp(config, context, check, server, Health("ready"), sealed=False)
            http = service.Http(app, context)
            serving = asyncio.create_task(http.serve(sockets=[listener]))
            try:
                async with asyncio.timeout(_WARM_SECONDS):
                    await _converse(str(place))
            finally:
                http.end()
                await serving
    with contextlib.suppress(FileNotFoundError):
        place.unlink()


async def _converse(place: str) -> None:
    """Ask as the hive and its callers do: health, the list, and calls, of either era."""
    await _asked(place, "GET", "/_ash/health", {}, None)
    nothing: dict[str, Any] = {}
    meta = {
        "io.modelcontextprotocol/protocolVersion": _MODERN,
        "io.modelcontextprotocol/clientInfo": _CLIENT,
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    called: dict[str, Any] = {"name": "ash_exec", "arguments": {"command": ["true"]}}
    unknown: dict[str, Any] = {"name": "no_such_tool", "arguments": {}}
    for method, params in (("tools/list", nothing), ("tools/call", called), ("tools/call", unknown)):
        headers = {"mcp-protocol-version": _MODERN, "mcp-method": method, "mcp-name": str(params.get("name", ""))}
        await _asked(place, "POST", "/mcp", headers, _request(method, {**params, "_meta": meta}))
    opening = {"protocolVersion": _LEGACY, "capabilities": {}, "clientInfo": _CLIENT}
    head = await _asked(place, "POST", "/mcp", {}, _request("initialize", opening))
    session = next((line[16:] for line in head.split("\r\n") if line.lower().startswith("mcp-session-id: ")), "")
    headers = {"mcp-session-id": session, "mcp-protocol-version": _LEGACY}
    await _asked(place, "POST", "/mcp", headers, {"jsonrpc": "2.0", "method": "notifications/initialized"})
    for method, params in (("tools/list", nothing), ("tools/call", called), ("tools/call", unknown)):
        await _asked(place, "POST", "/mcp", headers, _request(method, params))
    await _asked(place, "DELETE", "/mcp", headers, None)


def _request(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


async def _asked(place: str, method: str, path: str, headers: Mapping[str, str], body: Any) -> str:
    """Return the head of the answer, once all of it is there."""
    reader, writer = await asyncio.open_unix_connection(place)
    data = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: localhost",
        "connection: close",
        "accept: application/json, text/event-stream",
        "content-type: application/json",
        f"content-length: {len(data)}",
        *(f"{name}: {value}" for name, value in headers.items() if value),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    answer = await reader.read()
    while more := await reader.read():
        answer += more
    writer.close()
    await writer.wait_closed()
    return answer.partition(b"\r\n\r\n")[0].decode("latin-1")
