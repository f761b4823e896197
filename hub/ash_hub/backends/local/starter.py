"""Starting a keeper: a detached process that outlives the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ash_hub.backends.local.paths import HivePaths
from ash_hub.backends.local.settings import LocalSettings
from ash_hub.egress.starting import proxy_command
from ash_mcp.errors import ConfigError

__all__ = ["start_keeper"]

_BOOT = "import sys; sys.path.append(sys.argv[1]); from keeper.main import main; main()"
_READY_SECONDS = 20.0


def start_keeper(settings: LocalSettings, paths: HivePaths, lead: float) -> bool:
    """Start a keeper and wait until it listens; False if another one holds the state directory.

    Args:
        lead: Seconds that the hive's time is ahead of this host's steady clock; the keeper tells it to later hubs.

    Raises:
        ConfigError: The keeper could not start.
    """
    config = {
        "name": paths.name,
        "directory": str(paths.directory),
        "lock_file": str(paths.lock_file),
        "grace_seconds": settings.grace_seconds,
        "log_bytes": settings.log_bytes,
        "max_sandboxes": settings.max_sandboxes,
        "hub_pid": os.getpid(),
        "lead": lead,
        "egress_command": proxy_command(),
    }
    with paths.log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
    try:
        said = process.communicate(json.dumps(config).encode(), timeout=_READY_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise ConfigError(f"the keeper did not start within {_READY_SECONDS:g} s: see {paths.log_file}") from error
    answer: dict[str, Any] = json.loads(said or b"{}")
    if answer.get("error") == "locked":
        return False
    if not answer.get("ready"):
        raise ConfigError(f"{answer.get('message', 'the keeper could not start')}; see also {paths.log_file}")
    return True
