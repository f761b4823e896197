"""Sandboxes on this host: processes that a keeper owns and a launcher isolates.

backend.py    the Backend of this host, in the hub
settings.py   its settings; paths.py: its directories and sockets
host.py       what of isolation this host allows
runtime.py    the Python that the runner runs on
limits.py     limits of a sandbox, and which of them this host enforces
seccomp.py    the system call filter, by the numbers of `_syscalls.py`
plans.py      from a spec to the plan of a launch
starter.py    starts the keeper
link.py       the hub's connection to it
snapshot_requests.py  what it is asked about snapshots
keeper/       the keeper process, with the launchers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ash_hub.backends.base import Places
    from ash_hub.backends.local.backend import LocalBackend
    from ash_hub.backends.local.settings import LocalSettings

__all__ = ["LocalBackend", "LocalSettings", "build"]


def build(options: Mapping[str, Any], places: Places) -> LocalBackend:
    """Make the backend from a hive's settings."""
    from ash_hub.backends.local.backend import LocalBackend
    from ash_hub.backends.local.settings import LocalSettings

    own = {"state_dir": places.state_dir, "run_dir": places.run_dir, "log_dir": places.log_dir}
    settings = LocalSettings.model_validate({**options, **own})
    return LocalBackend(settings, hive_ports=places.ports, shared=places.shared, keep=places.keep)


def __getattr__(name: str) -> Any:
    """Import the backend with its first use: `ash wrap` needs its plans alone, and starts as fast as a server."""
    if name == "LocalBackend":
        from ash_hub.backends.local.backend import LocalBackend

        return LocalBackend
    if name == "LocalSettings":
        from ash_hub.backends.local.settings import LocalSettings

        return LocalSettings
    raise AttributeError(name)
