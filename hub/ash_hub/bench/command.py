"""The command `ash bench`."""

from __future__ import annotations

import signal
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Annotated, Final, Literal

import anyio
import typer

if TYPE_CHECKING:
    from ash_hub.bench.rows import Row

__all__ = ["bench"]

SPAWNS: Final = 10
CALLS: Final = 1600
SHORT_SPAWNS: Final = 2
SHORT_CALLS: Final = 160
LOAD_SECONDS: Final = 4.0
SHORT_LOAD_SECONDS: Final = 2.0
IN_A_ROW: Final = 5
AT_ONCE: Final = 20


def bench(
    what: Annotated[
        Literal["density"] | None,
        typer.Argument(help="`density`: what a sandbox of this machine costs, and how many it holds."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    short: Annotated[bool, typer.Option("--short", help="Fewer samples: seconds instead of half a minute.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Measure a hive of its own, also if one of yours runs.")
    ] = False,
    neighbour: Annotated[
        bool, typer.Option("--neighbour", help="Instead, time a sandbox's calls while another does its worst.")
    ] = False,
    kubernetes: Annotated[
        bool,
        typer.Option("--kubernetes", help="Instead, time spawns on a cluster beside bare pods."),
    ] = False,
    in_a_row: Annotated[int, typer.Option(min=1, help="With --kubernetes: spawns one after another.")] = IN_A_ROW,
    at_once: Annotated[int, typer.Option(min=0, help="With --kubernetes: spawns at once.")] = AT_ONCE,
    sandboxes: Annotated[
        int | None, typer.Option(min=1, help="With density: how many are to live at once.", show_default="1000")
    ] = None,
) -> None:
    """Measure spawns and calls, beside the same sandbox's server called directly.

    The hive of yours that runs is measured, or one that is started for it. Compare ratios, not times: both sides of
    a ratio saw the same machine under the same load.
    """
    from ash_mcp.cli.context import run_async
    from ash_mcp.cli.output import emit_json, new_console

    if neighbour:
        _measure_neighbour(as_json=as_json, short=short, private=private)
        return
    found: list[Row] = []

    async def run() -> None:
        async with _ending_what_it_started():
            with _steps(quiet=as_json) as step:
                await measure_all(step)

    async def measure_all(step: Callable[[str], None]) -> None:
        if what == "density":
            from ash_hub.bench import density

            found.extend(await density.measure(short=short, many=sandboxes, step=step))
        elif kubernetes:
            from ash_hub.bench import cluster

            found.extend(await cluster.measure(in_a_row, at_once, step))
        else:
            found.extend(await measure(short=short, private=private, step=step))

    run_async(run, as_json=as_json)
    from ash_hub.bench.rows import row_to_json, table_of

    if as_json:
        emit_json({"rows": [row_to_json(row) for row in found]})
    else:
        new_console().print(table_of(found))


def _measure_neighbour(*, as_json: bool, short: bool, private: bool) -> None:
    from ash_hub.bench import neighbour
    from ash_hub.bench.target import open_target
    from ash_mcp.cli.context import run_async
    from ash_mcp.cli.output import emit_json, say

    found: list[neighbour.Row] = []

    async def run() -> None:
        with _steps(quiet=as_json) as step:
            step("timing calls beside a sandbox that does its worst")
            async with _ending_what_it_started(), open_target(private=private) as target:
                found.extend(await neighbour.measure(target.url, SHORT_LOAD_SECONDS if short else LOAD_SECONDS))

    run_async(run, as_json=as_json)
    if as_json:
        emit_json({"rows": [neighbour.row_to_json(row) for row in found]})
    else:
        say("\n".join(neighbour.line_of(row) for row in found))


@asynccontextmanager
async def _ending_what_it_started() -> AsyncGenerator[None]:
    """Leave as usual when told to end by SIGTERM, so that a hive that was started for the bench ends, too."""
    told = False

    async def heed(group: anyio.abc.TaskGroup) -> None:
        nonlocal told
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                told = True
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(heed, group)
        yield
        group.cancel_scope.cancel()
    if told:
        raise typer.Exit(128 + signal.SIGTERM)


async def measure(*, short: bool, private: bool, step: Callable[[str], None]) -> Sequence[Row]:
    """Run every measurement and return their rows.

    Raises:
        AshError: There is no hive to measure and none can be started, or it failed.
    """
    from ash_hub.bench.measurements import MEASUREMENTS, RECIPE, Bench
    from ash_hub.bench.target import open_target
    from ash_mcp.client import Hive

    spawns, calls = (SHORT_SPAWNS, SHORT_CALLS) if short else (SPAWNS, CALLS)
    step("looking for a hive")
    rows: list[Row] = []
    async with open_target(private=private) as target, Hive(target.url) as hive, hive.spawn(RECIPE) as box:
        for measurement in MEASUREMENTS:
            rows += await measurement(Bench(target, hive, box, spawns, calls, step))
    return rows


@contextmanager
def _steps(*, quiet: bool) -> Generator[Callable[[str], None]]:
    """Show on standard error what is going on, where a person sees it."""
    if quiet:
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update
