"""`ash list`: the caller's sandboxes, once or as they change."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import anyio
import typer

from ash_mcp.cli.context import Cli
from ash_mcp.cli.output import emit_json, new_console, note, say
from ash_mcp.cli.tables import sandbox_table
from ash_mcp.cli.values import read_pairs
from ash_mcp.wire import info_to_json

if TYPE_CHECKING:
    from ash_mcp.client import Hive
    from ash_mcp.types import SandboxInfo

__all__ = ["list_sandboxes"]

_EVERY_SECONDS: Final = 1.0


async def list_sandboxes(
    cli: Cli,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also those that ended within the hour.")] = False,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", metavar="K=V", help="Only with this.")] = None,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this run.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Show your sandboxes and how they are.

    With --watch and --json each change is one line of JSON.
    """
    labels = read_pairs(label or (), "a label") or None
    async with cli.hive() as hive:
        if watch:
            await _watch(cli, hive, labels, everything, run)
            return
        infos = await hive.list(labels=labels, run=run, include_ended=everything)
    if cli.as_json:
        emit_json(_shapes(infos, time.time()))
    elif infos:
        new_console().print(sandbox_table(infos, now=time.time(), scope=cli.scope))
    else:
        note("No sandboxes. `ash spawn` starts one.")


async def _watch(cli: Cli, hive: Hive, labels: dict[str, str] | None, everything: bool, run: str | None) -> None:
    if sys.stdout.isatty() and not cli.as_json:
        await _watch_live(cli, hive, labels, everything, run)
        return
    import json

    console, before = new_console(), None
    while True:
        infos = await hive.list(labels=labels, run=run, include_ended=everything)
        if infos != before:
            if cli.as_json:
                say(json.dumps(_shapes(infos, time.time()), ensure_ascii=False))
            else:
                console.print(sandbox_table(infos, now=time.time(), scope=cli.scope))
        before = infos
        await anyio.sleep(_EVERY_SECONDS)


async def _watch_live(cli: Cli, hive: Hive, labels: dict[str, str] | None, everything: bool, run: str | None) -> None:
    from rich.live import Live

    with Live(console=new_console(), auto_refresh=False) as live:
        while True:
            infos = await hive.list(labels=labels, run=run, include_ended=everything)
            live.update(sandbox_table(infos, now=time.time(), scope=cli.scope), refresh=True)
            await anyio.sleep(_EVERY_SECONDS)


def _shapes(infos: Sequence[SandboxInfo], now: float) -> dict[str, Any]:
    return {"sandboxes": [info_to_json(info, now=now) for info in infos]}
