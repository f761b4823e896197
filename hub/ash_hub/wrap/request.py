"""A request to `ash wrap`, from its command line: the server, its folders, environment and network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ash_hub.egress.policy import Policy, PolicyError
from ash_mcp.errors import ConfigError

__all__ = ["LEAST_MEMORY", "Folder", "WrapRequest", "environment_of", "folder_of", "network_of"]

LEAST_MEMORY = 64 * 1024 * 1024
_NEVER_SHOWN = ("/", "/proc", "/dev", "/sys")


@dataclass(frozen=True, slots=True)
class Folder:
    """A file or directory of the host that the server sees under the same path."""

    path: str
    is_writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapRequest:
    """One server and what it may have."""

    words: tuple[str, ...]
    """Its command line, as on the host."""
    folders: tuple[Folder, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    network: str | tuple[str, ...] = "none"
    """As a recipe's: `none`, `internet` or a list."""
    memory_bytes: int = 2 * 1024**3
    """Of all its processes together, with what it writes to places of its own; where control groups can be used."""
    refresh: bool = False
    """Whether its package is installed anew."""


def folder_of(text: str) -> Folder:
    """Read `PATH` or `PATH:rw`.

    Raises:
        ConfigError: There is no such folder, or it is one that would show the whole host.
    """
    path, separator, mode = text.rpartition(":")
    if not separator or mode not in ("rw", "ro"):
        path, mode = text, "ro"
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise ConfigError(f"--folder: there is no {path} here; name a folder or file that is there")
    if os.path.realpath(path) in _NEVER_SHOWN:
        raise ConfigError(f"--folder: {path} would show the whole host; name what the server needs of it")
    return Folder(path, mode == "rw")


def environment_of(given: Sequence[str], own: Mapping[str, str]) -> dict[str, str]:
    """Read `NAME=VALUE`, and `NAME` for the value that it has in `own`.

    Raises:
        ConfigError: A name has no value.
    """
    found: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not name or (not separator and name not in own):
            raise ConfigError(f"--env: {text} is not set here; set it, or say {name or 'NAME'}=VALUE")
        found[name] = value if separator else own[name]
    return found


def network_of(given: Sequence[str]) -> str | tuple[str, ...]:
    """Read what `--network` was given: `none`, `internet`, or domains, each by itself or separated by commas.

    Raises:
        ConfigError: It is no network policy.
    """
    entries = tuple(part for text in given for part in text.split(",") if part)
    policy = entries[0] if len(entries) == 1 and entries[0] in ("none", "internet") else entries
    try:
        Policy.parse(policy)
    except PolicyError as error:
        raise ConfigError(f"--network: {error}") from error
    return policy if policy else "none"
