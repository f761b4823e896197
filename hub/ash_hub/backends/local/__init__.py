"""Sandboxes on this host: children of a keeper, isolated by a launcher."""

from collections.abc import Mapping
from typing import Any

from ash_hub.backends.base import Places
from ash_hub.backends.local.backend import LocalBackend
from ash_hub.backends.local.settings import LocalSettings

__all__ = ["LocalBackend", "LocalSettings", "build"]


def build(options: Mapping[str, Any], places: Places) -> LocalBackend:
    """Make the backend from a hive's settings."""
    own = {"state_dir": places.state_dir, "run_dir": places.run_dir, "log_dir": places.log_dir}
    settings = LocalSettings.model_validate({**options, **own})
    return LocalBackend(settings, hive_ports=places.ports, shared=places.shared, keep=places.keep)
