"""Three hives behind nginx: served, tested as if they were one, and killed under load.

Needs redis-server and nginx (Debian, Ubuntu: apt-get install redis-server nginx-light).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Annotated

import anyio
import typer
from cluster import Missing, running
from rich.console import Console
from rich.table import Table
from storm import WAYS, Figures, Storm

ROOT = Path(__file__).parents[2]
SUITE = ("tests/system/test_mcp_clients.py", "tests/system/test_hive_face.py", "tests/system/test_direct_doors.py")
LEAST_DONE = 0.99

app = typer.Typer(
    help=__doc__, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.command()
def up() -> None:
    """Serve until Ctrl-C."""
    over = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        over.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with running() as cluster:
        print(f"three hives that are one: {cluster.url}", flush=True)
        for replica in cluster.replicas:
            print(f"  one of them: {replica.url}", flush=True)
        over.wait()


@app.command()
def suite(
    tests: Annotated[list[str] | None, typer.Argument(help="Test files; those of the MCP face if none.")] = None,
) -> None:
    """Run tests that want one hive through nginx, where each request reaches another."""
    with running() as cluster:
        command = [sys.executable, "-m", "pytest", "-m", "not node and not clients", *(tests or SUITE)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "ASH_TEST_URL": cluster.url})
    raise typer.Exit(done.returncode)


@app.command()
def storm(
    seconds: Annotated[float, typer.Option(help="How long.")] = 120,
    calls: Annotated[int, typer.Option(help="How many calls in that time, if the machine can.")] = 10_000,
    kill_every: Annotated[float, typer.Option(help="Seconds between kills.")] = 2,
    least: Annotated[float, typer.Option(help="The share of calls that must be done.")] = LEAST_DONE,
) -> None:
    """Call six sandboxes in five ways while one hive after another is killed with -9."""
    with running() as cluster:
        figures = anyio.run(Storm(cluster, seconds=seconds, calls=calls, kill_every=kill_every).run)
    raise typer.Exit(0 if _show(figures) >= least and not figures.problems else 1)


def _show(figures: Figures) -> float:
    """Print what came of the calls and return the share that was done."""
    table = Table("way", "calls", "done", "failed, by kind")
    for way in WAYS:
        made = [call for call in figures.calls if call.way == way]
        kinds = Counter(call.outcome for call in made if call.outcome != "done")
        shown = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(5))
        table.add_row(way, str(len(made)), str(sum(call.outcome == "done" for call in made)), shown)
    Console().print(table)
    done = sum(call.outcome == "done" for call in figures.calls)
    share = done / len(figures.calls)
    print(f"{done} of {len(figures.calls)} calls done ({100 * share:.2f} %), {len(figures.kills)} kills,")
    print(f"{figures.handshakes} handshakes made anew; {len(figures.problems)} problems")
    for problem in figures.problems[:20]:
        print(f"  {problem}")
    return share


if __name__ == "__main__":
    try:
        app()
    except Missing as missing:
        print(missing, file=sys.stderr)
        sys.exit(1)
