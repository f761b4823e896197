"""`python -m ash_hub.egress CONFIGURATION` runs the proxy by itself; without one, as a child process (`main.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

from .main import main
from .standalone import run

if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif len(sys.argv) == 2:
        try:
            run(Path(sys.argv[1]))
        except (OSError, ValueError) as error:
            sys.exit(f"egress proxy: {error}")
    else:
        sys.exit("usage: python -m ash_hub.egress [CONFIGURATION]")
