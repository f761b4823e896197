"""Rows of a measurement, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Row", "median", "row_to_json", "table_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    unit: str
    hive: float
    """Not a number where it could not be measured; `what` says why."""
    direct: float | None = None
    """The same without the hive; None where that makes no sense."""
    samples: int
    """How many were measured on each side."""
    goal: str = ""
    """What it should reach, for a person."""

    @property
    def ratio(self) -> float | None:
        if self.direct is None or self.direct <= 0:
            return None
        return self.hive / self.direct


def median(values: Sequence[float]) -> float:
    """Return the middle one; of nothing, not a number."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def row_to_json(row: Row) -> dict[str, Any]:
    return {
        "what": row.what,
        "unit": row.unit,
        "hive": None if math.isnan(row.hive) else round(row.hive, 4),
        "direct": round(row.direct, 4) if row.direct is not None else None,
        "ratio": round(row.ratio, 4) if row.ratio is not None else None,
        "samples": row.samples,
        "goal": row.goal,
    }


def table_of(rows: Iterable[Row]) -> Table:
    """Return the rows for a person."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for header in ("hive", "direct", "ratio"):
        table.add_column(header, justify="right")
    table.add_column("unit")
    table.add_column("samples", justify="right")
    table.add_column("goal")
    for row in rows:
        direct = _shown(row.direct) if row.direct is not None else "-"
        table.add_row(row.what, _shown(row.hive), direct, _ratio(row.ratio), row.unit, str(row.samples), row.goal)
    return table


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" if ratio >= 0.05 or ratio <= 0 else f"1/{1 / ratio:.0f}"


def _shown(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
