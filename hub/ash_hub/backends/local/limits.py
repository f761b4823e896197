"""What one sandbox may use: from the spec and the settings to numbers, and what the host cannot hold it to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ash_hub.backends.local.settings import LocalSettings
from ash_mcp.errors import ConfigError
from ash_mcp.types import SandboxSpec

__all__ = ["Enforcement", "Limits", "cpu_quantity", "limits_of", "memory_quantity"]

_CPU = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m?)")
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|[kKMGTPE]i?)?")
_LETTERS = "KMGTPE"
_LEAST_MEMORY = 32 * 1024 * 1024
_LEAST_CPU = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one sandbox. Sizes in bytes."""

    memory_bytes: int
    cpu: float | None
    """Processors' worth of time; None is as much as there is."""
    processes: int
    """Processes and threads."""
    open_files: int
    workspace_bytes: int
    home_bytes: int
    tmp_bytes: int
    shm_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Enforcement:
    """What this host can hold a sandbox to as a whole."""

    version: int
    """Of control groups; 0 is none."""
    controllers: frozenset[str]
    namespaced_processes: bool
    """Whether the kernel counts RLIMIT_NPROC for each user namespace (Linux 5.14 and later, not for root)."""

    def for_keeper(self, limits: Limits) -> dict[str, Any]:
        """Return what the keeper writes into control groups."""
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
        files = max(limits.workspace_bytes, limits.home_bytes, limits.tmp_bytes) + 1024 * 1024
        found = {"NOFILE": limits.open_files, "CORE": 0, "FSIZE": files, "MEMLOCK": 8 * 1024 * 1024, "MSGQUEUE": 0}
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


def limits_of(spec: SandboxSpec, settings: LocalSettings) -> Limits:
    """Return the limits of `spec`, with the settings' for what it does not name.

    Raises:
        ConfigError: A quantity cannot be read or is too small to start with.
    """
    wanted = spec.resources.limits
    memory = settings.memory_bytes if wanted.memory is None else memory_quantity(wanted.memory)
    cpu = settings.cpu if wanted.cpu is None else cpu_quantity(wanted.cpu)
    if memory < _LEAST_MEMORY:
        raise ConfigError(f"a memory limit of {wanted.memory} is too small: give at least 32Mi")
    if cpu is not None and cpu < _LEAST_CPU:
        raise ConfigError(f"a cpu limit of {wanted.cpu} is too small: give at least 10m")
    return Limits(
        memory_bytes=memory,
        cpu=cpu,
        processes=settings.max_processes,
        open_files=settings.open_files,
        workspace_bytes=settings.workspace_bytes,
        home_bytes=settings.home_bytes,
        tmp_bytes=settings.tmp_bytes,
        shm_bytes=settings.shm_bytes,
    )


def cpu_quantity(text: str) -> float:
    """Return processors for a Kubernetes quantity such as `500m`, `2` or `0.5`."""
    match = _CPU.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of cpu: write 500m, 0.5 or 2")
    return float(match[1]) / (1000 if match[2] else 1)


def memory_quantity(text: str) -> int:
    """Return bytes for a Kubernetes quantity such as `256Mi`, `1G` or `1048576`."""
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of memory: write 256Mi, 1G or a number of bytes")
    suffix = match[2] or ""
    if suffix == "m":
        return int(float(match[1]) / 1000)
    base = 1024 if suffix.endswith("i") else 1000
    power = _LETTERS.index(suffix[0].upper()) + 1 if suffix else 0
    return int(float(match[1]) * base**power)
