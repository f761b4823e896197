"""The progress line on a terminal, shown after a second."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio

from ash_mcp.cli.output import clean

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

__all__ = ["Meter", "waiting"]

PATIENCE_SECONDS: Final = 1.0


class Meter:
    """The progress of an operation; may be updated whether it is shown or not."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._done = 0.0
        self._total: float | None = None
        self._paint: Callable[[], object] = lambda: None

    def update(self, *, label: str | None = None, done: float | None = None, total: float | None = None) -> None:
        """Update the progress; None leaves a value unchanged."""
        self._label = self._label if label is None else clean(label)
        self._done = self._done if done is None else done
        self._total = self._total if total is None else total
        self._paint()

    def show_on(self, bar: Bar) -> None:
        task = bar.add_task(self._label, total=self._total)

        def paint() -> None:
            bar.update(task, description=self._label, completed=self._done, total=self._total)

        self._paint = paint
        paint()


@asynccontextmanager
async def waiting(label: str, *, show: bool = True, in_bytes: bool = False) -> AsyncGenerator[Meter]:
    """Show `label` with its progress on a terminal when the block takes longer than a second."""
    meter = Meter(label)
    if not show or not sys.stderr.isatty():
        yield meter
        return
    async with anyio.create_task_group() as group:
        group.start_soon(_show_later, meter, in_bytes)
        try:
            yield meter
        finally:
            group.cancel_scope.cancel()


async def _show_later(meter: Meter, in_bytes: bool) -> None:
    await anyio.sleep(PATIENCE_SECONDS)
    bar = _new_bar(in_bytes)
    meter.show_on(bar)
    with bar:
        await anyio.sleep_forever()


def _new_bar(in_bytes: bool) -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24)]
    extra = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else []
    return Progress(*columns, *extra, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
