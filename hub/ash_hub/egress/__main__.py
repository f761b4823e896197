"""`python -m ash_hub.egress CONFIGURATION` runs the proxy by itself; without one, as a child process (`main.py`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .main import main
from .shared import run as run_shared
from .standalone import run as run_standalone

__all__ = ["serve"]


def serve(path: Path) -> None:
    """Serve as the configuration at `path` says, which is one of `shared.py` or of `standalone.py`; never returns."""
    try:
        run = run_shared if "hive" in json.loads(path.read_text()) else run_standalone
        run(path)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"egress proxy: {error}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif len(sys.argv) == 2:
        serve(Path(sys.argv[1]))
    else:
        sys.exit("usage: python -m ash_hub.egress [CONFIGURATION]")
