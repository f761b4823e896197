"""The limits of one sandbox as numbers, from its spec and the settings, and which of them this host enforces."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ash_hub.backends.amounts import amounts_of

if TYPE_CHECKING:
    from ash_hub.backends.local.settings import LocalSettings
    from ash_mcp.types import SandboxSpec

__all__ = ["Enforcement", "Limits", "limits_of", "namespaced_processes"]

_MIB = 1024 * 1024
_PROCESSES = 88 * _MIB
"""The part of the memory limit, in bytes, that files may not take: for the runner, its server and a command."""
_PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one sandbox. Sizes in bytes."""

    memory_bytes: int
    cpu: float | None
    """In processors; None: all that there are."""
    processes: int
    """Processes and threads."""
    open_files: int
    workspace_bytes: int
    home_bytes: int
    tmp_bytes: int
    shm_bytes: int
    root_bytes: int = 0
    """What may be written to a machine's root and `/usr`; 0 where they are read-only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enforcement:
    """The means of this host to limit a sandbox as a whole, and not only each of its processes."""

    version: int
    """Of control groups, 1 or 2; 0: there are none."""
    controllers: frozenset[str]
    namespaced_processes: bool
    """Whether the kernel counts RLIMIT_NPROC for each user namespace (Linux 5.14 and later, not for root)."""

    def for_keeper(self, limits: Limits) -> dict[str, Any]:
        """Return the limits that the keeper sets on the sandbox's control group, as `Group.create` takes them."""
        wanted = {
            "memory": ("memory_bytes", limits.memory_bytes),
            "pids": ("processes", limits.processes),
            "cpu": ("cpu", limits.cpu),
        }
        held = {name for name in self.controllers if wanted[name][1] is not None}
        return {"controllers": sorted(held)} | {wanted[name][0]: wanted[name][1] for name in held}

    def rlimits(self, limits: Limits) -> dict[str, int]:
        """Return the limits of each process, by the names that follow `RLIMIT_`."""
        # Above the size of every place, so that a full one is told as such and nobody is killed by SIGXFSZ.
        files = max(limits.workspace_bytes, limits.home_bytes, limits.tmp_bytes, limits.root_bytes) + 1024 * 1024
        # A core of 1 byte: with 0, the kernel would still start the program that a host may have for cores. This is
        # the one value that it takes for "none, whatever the pattern is"; a file is not written with it, either.
        found = {"NOFILE": limits.open_files, "CORE": 1, "FSIZE": files, "MEMLOCK": 8 * 1024 * 1024, "MSGQUEUE": 0}
        return found if "memory" in self.controllers else found | {"DATA": limits.memory_bytes}

    @property
    def inner_processes(self) -> bool:
        """Whether the sandbox's first process sets the limit on processes itself."""
        return "pids" not in self.controllers and self.namespaced_processes

    def warnings(self) -> list[str]:
        """Return a sentence for each limit that this host does not enforce."""
        found: list[str] = []
        if "memory" not in self.controllers:
            found.append("memory is limited for each process only: no memory control group can be used here")
            found.append("the number of files is not limited: no memory control group can be used here")
        if "pids" not in self.controllers and not self.namespaced_processes:
            found.append("the number of processes is not limited: no pids control group can be used here")
        if "cpu" not in self.controllers:
            found.append("processor time is not limited: no cpu control group can be used here")
        return found


def limits_of(spec: SandboxSpec, settings: LocalSettings, *, machine: bool = False) -> Limits:
    """Return the limits of `spec`; where it names none, those of the settings.

    Args:
        machine: Whether it has a root to write to.

    Raises:
        ConfigError: A quantity cannot be read or is too small to start with.
    """
    amounts = amounts_of(spec.resources.limits, memory_bytes=settings.memory_bytes, cpu=settings.cpu)
    return Limits(
        memory_bytes=amounts.memory_bytes,
        cpu=amounts.cpu,
        processes=settings.max_processes,
        open_files=settings.open_files,
        **_sizes(settings, amounts.memory_bytes - _PROCESSES, machine=machine),
    )


def _sizes(settings: LocalSettings, most: int, *, machine: bool) -> dict[str, int]:
    """Return the sizes of the places for files, in proportion smaller where they are more than `most` together.

    Files are in memory and count against its limit: a full place is told to whoever writes, while a sandbox over its
    limit is killed.
    """
    names = ("workspace_bytes", "home_bytes", "tmp_bytes", "shm_bytes", *(("root_bytes",) if machine else ()))
    sizes: dict[str, int] = {name: getattr(settings, name) for name in names}
    together = sum(sizes.values())
    if together <= most:
        return sizes
    return {name: size * most // together // _PAGE * _PAGE for name, size in sizes.items()}


def namespaced_processes() -> bool:
    """Return whether RLIMIT_NPROC, set inside a user namespace, bounds that namespace alone."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return os.geteuid() != 0 and release is not None and (int(release[1]), int(release[2])) >= (5, 14)
