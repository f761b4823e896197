"""A hive that nobody runs yet: the program that a host starts for it, and its end."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ash_mcp.paths import announced_url

__all__ = ["ColdHive", "cold_hive"]

_END_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class ColdHive:
    """A program that stands for `ash`: with it the bridge finds and starts a hive of its own directories."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "ash"

    @property
    def url(self) -> str | None:
        """Return the URL of the hive that a host has started, or None."""
        return announced_url({"ASH_HUB_RUN_DIR": str(self.folder / "run")})


@contextmanager
def cold_hive(ash: str) -> Generator[ColdHive]:
    """Give a hive that does not run; `ash` is the real program. What runs at the end is ended."""
    hive = ColdHive(Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp")))  # a socket's path must be short
    # hosts drop variables, and a home of its own keeps it out of what is ended with the host
    variables = {
        "HOME": hive.folder,
        "ASH_HUB_STATE_DIR": hive.folder / "state",
        "ASH_HUB_RUN_DIR": hive.folder / "run",
    }
    exports = " ".join(f"{name}={value}" for name, value in variables.items())
    hive.program.write_text(f'#!/bin/sh\nexport {exports}\nexec {shlex.quote(ash)} "$@"\n')
    hive.program.chmod(0o755)
    try:
        yield hive
    finally:
        _end(hive.folder / "run/hive.json")
        shutil.rmtree(hive.folder)


def _end(announced: Path) -> None:
    if not announced.exists():
        return
    descriptor = os.pidfd_open(json.loads(announced.read_text())["pid"])
    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    ended = select.select([descriptor], [], [], _END_SECONDS)[0]
    os.close(descriptor)
    assert ended, "the hive did not end"
