"""The `ash` command. Nothing is imported before it is needed, so that `ash --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_BRIDGE = ["up", "--stdio"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 failed, 2 usage, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == _BRIDGE:  # hosts wait for its first answer, and what reads other command lines takes long to import
        _run_bridge()
    elif words[:1] != ["wrap"] or not _run_wrap(words[1:]):
        from ash_mcp.cli.app import run

        run(words)


def _run_bridge() -> None:
    import anyio

    from ash_mcp.bridge.stdio_bridge import run_bridge
    from ash_mcp.errors import AshError

    try:
        anyio.run(run_bridge)
    except KeyboardInterrupt:
        sys.exit(130)
    except AshError as error:
        sys.stderr.write(f"ash: {error.message}\n")
        sys.exit(1)


def _run_wrap(words: Sequence[str]) -> bool:
    """Run `ash wrap` without the other commands, since hosts wait for it, too; False if it is not installed."""
    from importlib.metadata import entry_points

    for point in entry_points(group="ash.commands", name="wrap"):
        try:
            command = point.load()
        except ModuleNotFoundError:
            return False
        command(args=words, prog_name="ash wrap")
        return True
    return False
