"""Paths of this user's hive: its run and state directories, and the file that announces its URL."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["HIVE_FILE", "announced_url", "default_run_dir", "default_state_dir"]

HIVE_FILE: Final = "hive.json"
"""In the run directory: `{"url", "pid", "started_at"}` of the hive that serves."""

_RUNTIME_PARENT: Final = Path("/run/user")


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the directory of what outlives a hive: `$XDG_STATE_HOME/ash`, else `~/.local/state/ash`."""
    env = os.environ if environ is None else environ
    return Path(env.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "ash"


def default_run_dir(environ: Mapping[str, str] | None = None, *, runtime_parent: Path = _RUNTIME_PARENT) -> Path:
    """Return the directory of a hive's sockets and of `hive.json`.

    MCP hosts start their servers with a bare environment, so the user's runtime directory is found without
    `XDG_RUNTIME_DIR`, too: otherwise a bridge would look elsewhere than the shell that started the hive.
    """
    env = os.environ if environ is None else environ
    named, own = env.get("XDG_RUNTIME_DIR"), runtime_parent / str(os.geteuid())
    if named:
        return Path(named) / "ash"
    if own.is_dir() and own.stat().st_uid == os.geteuid():
        return own / "ash"
    return Path("/run/ash") if os.geteuid() == 0 else Path(f"/tmp/ash-{os.geteuid()}")


def announced_url(environ: Mapping[str, str] | None = None) -> str | None:
    """Return the URL that this user's running hive has announced, or None."""
    env = os.environ if environ is None else environ
    file = Path(env.get("ASH_HUB_RUN_DIR") or default_run_dir(env)) / HIVE_FILE
    try:
        if file.stat().st_uid != os.geteuid():  # anyone could have written it, in a directory such as /tmp
            return None
        hive = json.loads(file.read_text(encoding="utf-8"))
        os.kill(int(hive["pid"]), 0)
        return str(hive["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
