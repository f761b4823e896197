"""The main job before the reader's eyes, over MCP: spawn, the tools that appeared, a command, destroy."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from ash_mcp.cli.context import leaf
from ash_mcp.client import Hive
from ash_mcp.errors import AshError
from ash_mcp.sandbox import Sandbox

__all__ = ["walk"]

Say = Callable[[str], None]

_LOOK_AROUND: Final = (
    'echo "user $(id -un), host $(uname -n), $(ls -d /proc/[0-9]* | wc -l) processes, '
    '$(ls /sys/class/net 2>/dev/null | grep -vc "^lo$") network cards"'
)


class _StepFailed(Exception):
    """A step went wrong; the walk ends."""


async def walk(url: str, say: Say) -> bool:
    """Show the main job, a line and a time for each step; return whether all of it went well."""
    say("")
    try:
        async with Hive(url) as hive:
            with _step(say, "spawn") as told:
                box = await hive.spawn()
                told.append(f"{box.session} ({box.info.recipe}, {box.id})")
            try:
                await _use(url, box, say)
            finally:
                with _step(say, "destroy") as told:
                    await box.destroy()
                    told.append(f"{box.session} is gone; {len(await hive.list())} sandboxes are left")
    except _StepFailed:
        return False
    say("")
    return True


async def _use(url: str, box: Sandbox, say: Say) -> None:
    with _step(say, "tools/list") as told:
        names = await _listed(url, f"{box.session}_")
        told.append(f"{len(names)} new tools, such as {', '.join(names[:3])}")
    with _step(say, "a command") as told:
        done = await box.exec(_LOOK_AROUND, check=True, timeout_seconds=30)
        told.append(f"in the sandbox: {done.stdout.strip()}")
    processes = sum(name.isdecimal() for name in os.listdir("/proc"))
    say(f"               on this machine: host {socket.gethostname()}, {processes} processes")


async def _listed(url: str, prefix: str) -> list[str]:
    """Return the names that any MCP host would see, by the client of the MCP SDK."""
    from mcp import Client

    async with Client(url) as client:
        names = [tool.name for tool in (await client.list_tools()).tools if tool.name.startswith(prefix)]
    if not names:
        raise AshError(f"the hive lists no tool {prefix}…")
    return names


@contextmanager
def _step(say: Say, name: str) -> Generator[list[str]]:
    """Say how a step went and how long it took."""
    told: list[str] = []
    start = time.perf_counter()
    try:
        yield told
    except Exception as exc:
        error = leaf(exc)
        took = time.perf_counter() - start
        say(f"  {name:<11} {took:6.2f} s  FAILED: {error}")
        raise _StepFailed from exc
    say(f"  {name:<11} {time.perf_counter() - start:6.2f} s  {' '.join(told)}")
