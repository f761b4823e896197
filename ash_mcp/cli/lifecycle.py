"""`ash logs`, `ash extend`, `ash network`, `ash destroy`: the life of a running sandbox."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

import anyio
import typer

from ash_mcp.cli.context import Cli, SessionArgument
from ash_mcp.cli.output import clean, complain, emit_json, emit_text, note
from ash_mcp.cli.tables import moment
from ash_mcp.cli.values import read_duration, read_network, shown_duration
from ash_mcp.cli.waiting import waiting
from ash_mcp.errors import SandboxGone
from ash_mcp.wire import info_to_json, network_text

if TYPE_CHECKING:
    from ash_mcp.client import Destroyed, Hive
    from ash_mcp.sandbox import Sandbox

__all__ = ["destroy", "extend", "logs", "network", "new_part"]

_TAIL_BYTES: Final = 65_536
_MOST_BYTES: Final = 524_288
_EVERY_SECONDS: Final = 0.5
_ANCHOR: Final = 64


async def logs(
    cli: Cli,
    session: SessionArgument,
    tail: Annotated[int, typer.Option(min=1, max=_MOST_BYTES, metavar="BYTES", help="How much.")] = _TAIL_BYTES,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the sandbox ends or Ctrl-C.")] = False,
) -> None:
    """Show what a sandbox's main process wrote.

    That is its recipe's server, not the commands that are run in it.
    """
    if follow and cli.as_json:
        raise typer.BadParameter("--follow streams text; leave --json out, or leave --follow out")
    async with cli.hive() as hive:
        box = await hive.attach(session)
        text = await box.logs(tail_bytes=tail)
        if cli.as_json:
            emit_json({"session": box.session, "sandbox_id": box.id, "log": text})
            return
        emit_text(text)
        if follow:
            await _follow(hive, box)


async def _follow(hive: Hive, box: Sandbox) -> None:
    before = await box.logs(tail_bytes=_MOST_BYTES)
    while True:
        await anyio.sleep(_EVERY_SECONDS)
        now = await box.logs(tail_bytes=_MOST_BYTES)
        fresh = new_part(before, now)
        if fresh:
            sys.stdout.write(clean(fresh) if sys.stdout.isatty() else fresh)
            sys.stdout.flush()
        before = now or before
        try:
            await hive.attach(box.id)
        except SandboxGone as gone:
            note(f"ash: {clean(gone.message)}")
            return


def new_part(before: str, now: str) -> str:
    """Return what `now` has after `before`, both being the last part of one growing text."""
    if not before or now.startswith(before):
        return now[len(before) :]
    start = -1
    while (start := before.find(now[:_ANCHOR], start + 1)) >= 0:
        overlap = len(before) - start
        if before[start:] == now[:overlap]:
            return now[overlap:]
    # Less than an anchor's length may be left of the old text.
    for overlap in range(min(_ANCHOR, len(before)), 0, -1):
        if before.endswith(now[:overlap]):
            return now[overlap:]
    return now


async def extend(
    cli: Cli,
    session: SessionArgument,
    duration: Annotated[str, typer.Argument(metavar="DURATION", help="How long from now: 90s, 10m, 2d.")],
) -> None:
    """Let a sandbox live for a time from now."""
    seconds = read_duration(duration)
    async with cli.hive() as hive:
        info = await hive.extend(session, seconds)
    now = time.time()
    left = shown_duration(info.expires_at - now)
    cli.tell(info_to_json(info, now=now), f"{info.session} lives until {moment(info.expires_at)} ({left})")


async def network(
    cli: Cli,
    session: SessionArgument,
    policy: Annotated[list[str], typer.Argument(metavar="none|internet|DOMAIN...", help="What it may reach.")],
) -> None:
    """Change what a sandbox may reach.

    Connections that the new policy refuses are closed. Only its owner's key lets it reach more than it does.
    """
    asked = read_network(",".join(policy))
    async with cli.hive() as hive:
        info = await hive.set_network(session, asked)
    cli.tell(info_to_json(info, now=time.time()), f"{info.session} has network: {clean(network_text(info.network))}")


async def destroy(
    cli: Cli,
    sessions: Annotated[list[str] | None, typer.Argument(metavar="SESSION...", help="Names or ids.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of yours, in this scope.")] = False,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="A run, with all that was spawned in it.")] = None,
) -> None:
    """End sandboxes with everything in them.

    Says which; ending one that has ended is no error.
    """
    if [bool(sessions), everything, run is not None].count(True) != 1:
        raise typer.BadParameter(
            "name the sandboxes to end, or say --all for all of yours, or --run (one of the three)"
        )
    async with cli.hive() as hive, waiting("ending sandboxes", show=not cli.as_json):
        if run is not None:
            done = await hive.destroy_run(run)
        else:
            done = await (hive.destroy_all() if everything else hive.destroy(*(sessions or ())))
    cli.tell(_shape(done), *_lines(done))
    if done.not_found:
        if not cli.as_json:
            complain(f"there is no sandbox {', '.join(done.not_found)}; `ash list` shows what there is")
        raise typer.Exit(1)


def _shape(done: Destroyed) -> dict[str, Any]:
    now = time.time()
    return {
        "destroyed": [info_to_json(info, now=now) for info in done.destroyed],
        "already_ended": [info_to_json(info, now=now) for info in done.already_ended],
        "not_found": list(done.not_found),
    }


def _lines(done: Destroyed) -> list[str]:
    lines = [f"Ended {info.session} ({info.recipe}, {info.id})" for info in done.destroyed]
    for info in done.already_ended:
        why = info.reason.value if info.reason is not None else info.state.value
        lines.append(f"{info.session} had ended before: {why}")
    return lines or ([] if done.not_found else ["No sandboxes to end"])
