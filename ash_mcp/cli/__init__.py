"""The `ash` command. Nothing is imported before it is needed, so that `ash --help` answers at once."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    from ash_mcp.cli.app import run

    run(arguments)
