"""Tables and lines that show sandboxes, tools and times."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ash_mcp.cli.output import clean
from ash_mcp.cli.values import shown_duration
from ash_mcp.types import EVERY_SCOPE, SandboxInfo, State, Tool
from ash_mcp.wire import network_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["moment", "sandbox_table", "tool_lines"]

_COLOURS = {
    State.PENDING: "yellow",
    State.STARTING: "yellow",
    State.READY: "green",
    State.STOPPING: "yellow",
    State.GONE: "dim",
    State.FAILED: "red",
}


def moment(at: float) -> str:
    """Return a time as this machine's clock shows it."""
    return datetime.datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def tool_lines(tools: Iterable[Tool]) -> Sequence[str]:
    """Return a line for each tool: its name and the first line of its description."""
    shown = list(tools)
    width = min(48, max((len(tool.name) for tool in shown), default=0))
    return [f"  {clean(tool.name):<{width}}  {_first_line(tool.description)}".rstrip() for tool in shown]


def _first_line(text: str, most: int = 100) -> str:
    line = clean(text.strip().partition("\n")[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def sandbox_table(infos: Iterable[SandboxInfo], *, now: float, scope: str | None) -> Table:
    """Return sandboxes as a table; scope, run and reason are shown where they say something."""
    from rich.table import Table
    from rich.text import Text

    shown = list(infos)
    scoped, ended = scope == EVERY_SCOPE, any(info.state.ended for info in shown)
    in_runs = any(info.run is not None for info in shown)
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["SESSION", "STATUS", "RECIPE", "AGE", "EXPIRES", "IDLE", "NETWORK", "LABELS"]
    for name in [
        *(["SCOPE"] if scoped else []),
        *names,
        *(["RUN"] if in_runs else []),
        *(["REASON"] if ended else []),
    ]:
        table.add_column(name, overflow="fold", no_wrap=name in ("SESSION", "STATUS"))
    for info in shown:
        cells = [Text(info.session), Text(info.state.value, style=_COLOURS[info.state])]
        cells += [Text(cell) for cell in _cells(info, now)]
        if scoped:
            cells.insert(0, Text(info.scope or "(default)"))
        if in_runs:
            cells.append(Text(info.run or "-"))
        if ended:
            cells.append(Text(_reason(info)))
        table.add_row(*cells)
    return table


def _cells(info: SandboxInfo, now: float) -> Sequence[str]:
    labels = " ".join(f"{key}={value}" for key, value in info.labels.items())
    age = shown_duration((info.ended_at or now) - info.created_at)
    if info.state.ended:
        return (info.recipe, age, "-", "-", "-", clean(labels))
    left, network = f"in {shown_duration(info.expires_at - now)}", clean(network_text(info.network))
    return (info.recipe, age, left, _idle(info, now), network, clean(labels))


def _idle(info: SandboxInfo, now: float) -> str:
    """Return how long it has been without a call, of how long it may be."""
    since = info.last_call_at or info.ready_at
    quiet = shown_duration(now - since) if since is not None else "-"
    return f"{quiet} of {shown_duration(info.idle_seconds)}" if info.idle_seconds is not None else quiet


def _reason(info: SandboxInfo) -> str:
    if info.reason is None:
        return ""
    cause = f" ({info.cause.value})" if info.cause is not None else ""
    return info.reason.value + cause + (f": {clean(info.message)}" if info.message else "")
