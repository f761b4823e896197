"""`ash egress`: the egress proxy by itself, as in a pod."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["egress"]


def egress(
    config: Annotated[Path, typer.Argument(help="Its configuration.", exists=True, dir_okay=False)],
) -> None:
    """Let sandboxes out by their network policies, until SIGTERM.

    The configuration names sandboxes with their policies (docs/network.md), or a hive that is asked for them
    (docs/kubernetes.md). Each decision is a line on standard output.
    """
    import os

    from ash_hub.egress.starting import standing_command

    # Another interpreter, without what the command line has loaded.
    words = standing_command(config.absolute())
    os.execv(words[0], words)
