"""Directories and sockets of a local hive, which only its own user can reach."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ash_hub.backends.local.settings import LocalSettings
from ash_mcp.errors import ConfigError

__all__ = ["HivePaths", "hive_paths"]

_LONGEST_SOCKET_PATH = 107
_LONGEST_SOCKET_NAME = len("/s/sbx-") + 24


@dataclass(frozen=True, slots=True)
class HivePaths:
    name: str
    """Differs from those of other hives on this host; derived from the state directory."""
    directory: Path
    """The keeper's directory below the run directory; it is removed when the keeper ends."""
    lock_file: Path
    log_file: Path

    @property
    def control(self) -> Path:
        return self.directory / "keeper.sock"


def hive_paths(settings: LocalSettings) -> HivePaths:
    """Make the directories of the settings, and return the paths of this hive in them.

    Raises:
        ConfigError: A directory cannot be made, belongs to somebody else, or has too long a path.
    """
    for path in (settings.state_dir, settings.run_dir, settings.log_dir):
        _private_directory(path)
    digest = hashlib.sha256(os.fsencode(settings.state_dir.resolve())).hexdigest()[:8]
    directory = settings.run_dir.resolve() / digest
    excess = len(os.fsencode(directory)) + _LONGEST_SOCKET_NAME - _LONGEST_SOCKET_PATH
    if excess > 0:
        raise ConfigError(
            f"the run directory {settings.run_dir} has a path {excess} characters too long for Unix sockets: "
            "choose a shorter one with ASH_HUB_RUN_DIR"
        )
    return HivePaths(
        name=f"ash-{digest}",
        directory=directory,
        lock_file=settings.state_dir.resolve() / "keeper.lock",
        log_file=settings.log_dir.resolve() / "keeper.log",
    )


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"the directory {path} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is not a directory: remove it or choose another")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"the directory {path} belongs to another user: remove it or choose another")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise ConfigError(f"others can write to the directory {path}: run `chmod 700 {path}`")
