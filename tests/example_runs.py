"""Runs an example as its reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

__all__ = ["EXAMPLES", "run_example"]

EXAMPLES: Final = Path(__file__).parents[1] / "examples"


def run_example(url: str, name: str, *arguments: str, python: str = sys.executable) -> str:
    """Run an example against the hive at `url` to its end and return what it printed."""
    done = subprocess.run(
        [python, str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, "ASH_URL": url},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
