"""Scripts run with stand-ins for the programs that they call."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
NEEDED: Final = "basename bash cat dirname env grep mkdir mktemp realpath rm rmdir timeout".split()


def tools_in(folder: Path) -> Path:
    """Make a folder that as the whole PATH has what scripts call of the system, and nothing else."""
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def add_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/usr/bin/env bash\n{script}\n")
    tool.chmod(0o755)


def run(script: str, *arguments: str, path: Path | str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository with no other environment than this."""
    return subprocess.run(
        [ROOT / script, *arguments],
        env={"PATH": str(path), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
