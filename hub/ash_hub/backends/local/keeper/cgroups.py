"""Control groups: version 2 where controllers are ours to use, else version 1, else none.

A hive has one group per controller below the group in which the keeper was started, and each sandbox one below that.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTROLLERS", "Group", "Hierarchy", "find", "open_hierarchy", "usable"]

CONTROLLERS = ("memory", "pids", "cpu")
_PERIOD_MICROSECONDS = 100_000


@dataclass(frozen=True)
class Hierarchy:
    """The groups of one hive: for each controller that can be used, its directory."""

    version: int
    """2, 1, or 0 where there is none."""
    directories: Mapping[str, str]

    @property
    def distinct(self) -> list[str]:
        return sorted(set(self.directories.values()))

    def group(self, name: str) -> Group:
        return Group(self.version, {key: os.path.join(path, name) for key, path in self.directories.items()})

    def groups(self) -> list[Group]:
        """Return the group of every sandbox that there is, also of those that an earlier keeper left."""
        names = {entry for path in self.distinct for entry in _subdirectories(path)}
        return [self.group(name) for name in sorted(names)]

    def remove(self) -> None:
        for path in self.distinct:
            _remove_directory(path)


@dataclass(frozen=True)
class Group:
    """The control group of one sandbox."""

    version: int
    directories: Mapping[str, str]

    def create(self, limits: Mapping[str, Any]) -> list[str]:
        """Make the group with `memory_bytes`, `processes` and `cpu`, and return the controllers that hold."""
        held: list[str] = []
        for path in set(self.directories.values()):
            os.makedirs(path, exist_ok=True)
        for controller, files in _settings(self.version, limits).items():
            path = self.directories.get(controller)
            if path is not None and files and _write_all(path, files):
                held.append(controller)
        return held

    def entrances(self) -> list[str]:
        """Return the files that a process writes `0` to in order to join."""
        return [os.path.join(path, "cgroup.procs") for path in sorted(set(self.directories.values()))]

    def oom_kills(self) -> int:
        """Return how many processes of the group the kernel has killed for want of memory."""
        path = self.directories.get("memory")
        if path is None:
            return 0
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        for line in _lines(os.path.join(path, name)):
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def members(self) -> set[int]:
        return {int(line) for path in self.entrances() for line in _lines(path) if line.isdigit()}

    def kill(self) -> None:
        """Kill every process that is in the group now."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, 9)

    def remove(self) -> bool:
        """Remove the group, and say whether it is gone; it stays while a process is in it."""
        removed = [_remove_directory(path) for path in set(self.directories.values())]
        return all(removed)


def _settings(version: int, limits: Mapping[str, Any]) -> dict[str, list[tuple[str, str, bool]]]:
    """Return, for each controller, the files to write: name, value, and whether the limit depends on it."""
    memory, processes, cpu = (limits.get(key) for key in ("memory_bytes", "processes", "cpu"))
    quota = max(1_000, int(cpu * _PERIOD_MICROSECONDS)) if cpu else None
    found: dict[str, list[tuple[str, str, bool]]] = {}
    if processes:
        found["pids"] = [("pids.max", str(processes), True)]
    if version == 2:
        if memory:
            found["memory"] = [("memory.max", str(memory), True), ("memory.swap.max", "0", False)]
        if quota:
            found["cpu"] = [("cpu.max", f"{quota} {_PERIOD_MICROSECONDS}", True)]
        return found
    if memory:
        text = str(memory)
        found["memory"] = [("memory.limit_in_bytes", text, True), ("memory.memsw.limit_in_bytes", text, False)]
    if quota:
        period = ("cpu.cfs_period_us", str(_PERIOD_MICROSECONDS), True)
        found["cpu"] = [period, ("cpu.cfs_quota_us", str(quota), True)]
    return found


def find(memberships: str, mounts: str) -> tuple[str | None, dict[str, str]]:
    """Return the keeper's own group in version 2 and in each controller of version 1.

    Args:
        memberships: The text of `/proc/self/cgroup`.
        mounts: The text of `/proc/self/mountinfo`.
    """
    unified: tuple[str, str] | None = None
    legacy: dict[str, tuple[str, str]] = {}
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if kind[0] == "cgroup2":
            unified = (fields[3], fields[4])
        elif kind[0] == "cgroup":
            legacy |= {name: (fields[3], fields[4]) for name in kind[-1].split(",") if name in CONTROLLERS}
    own: str | None = None
    groups: dict[str, str] = {}
    for line in memberships.splitlines():
        _, names, path = line.split(":", 2)
        if not names and unified is not None:
            own = _located(path, *unified)
        for name in names.split(","):
            if name in legacy:
                groups[name] = _located(path, *legacy[name])
    return own, groups


def _located(path: str, root: str, mount_point: str) -> str:
    inside = os.path.relpath(path, root)
    return mount_point if inside == "." or inside.startswith("..") else os.path.join(mount_point, inside)


def open_hierarchy(name: str, own_processes: Iterable[int]) -> Hierarchy:
    """Make the hive's groups, called `name`, with every controller that can be had.

    Args:
        own_processes: The keeper and its hub. Version 2 wants a group that has controllers to hold no process
            itself, so these may be moved one group down if nobody else is beside them.
    """
    with open("/proc/self/cgroup") as memberships, open("/proc/self/mountinfo") as mounts:
        unified, legacy = find(memberships.read(), mounts.read())
    if unified is not None and (found := _open_unified(unified, name, set(own_processes))):
        return found
    directories: dict[str, str] = {}
    for controller, parent in legacy.items():
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError):
            os.makedirs(path, exist_ok=True)
            if os.access(os.path.join(path, "cgroup.procs"), os.W_OK):
                directories[controller] = path
    return Hierarchy(1 if directories else 0, directories)


def _open_unified(own: str, name: str, own_processes: set[int]) -> Hierarchy | None:
    if os.path.basename(own) == f"{name}-hive":
        own = os.path.dirname(own)  # an earlier keeper of this hive moved us here
    available = set(" ".join(_lines(os.path.join(own, "cgroup.controllers"))).split())
    wanted = [controller for controller in CONTROLLERS if controller in available]
    path = os.path.join(own, name)
    if not wanted:
        return None
    with contextlib.suppress(OSError):
        _delegate(own, wanted, os.path.join(own, f"{name}-hive"), own_processes)
        os.makedirs(path, exist_ok=True)
        _delegate(path, wanted, None, set())
        return Hierarchy(2, dict.fromkeys(wanted, path))
    _remove_directory(path)
    return None


def _delegate(path: str, controllers: list[str], leaf: str | None, movable: set[int]) -> None:
    switch = os.path.join(path, "cgroup.subtree_control")
    missing = set(controllers) - set(" ".join(_lines(switch)).split())
    if not missing:
        return
    text = " ".join(f"+{controller}" for controller in sorted(missing))
    try:
        _write(switch, text)
    except OSError as error:
        inside = {int(line) for line in _lines(os.path.join(path, "cgroup.procs")) if line.isdigit()}
        if error.errno != errno.EBUSY or leaf is None or not inside <= movable:
            raise
        os.makedirs(leaf, exist_ok=True)
        for pid in inside:
            _write(os.path.join(leaf, "cgroup.procs"), str(pid))
        _write(switch, text)


def _write_all(path: str, files: list[tuple[str, str, bool]]) -> bool:
    for name, value, needed in files:
        try:
            _write(os.path.join(path, name), value)
        except OSError:
            if needed:
                return False
    return True


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


def _subdirectories(path: str) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        yield from (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _remove_directory(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def usable() -> tuple[int, frozenset[str]]:
    """Return the version and the controllers that a hive started from here could use, without making anything."""
    with open("/proc/self/cgroup") as memberships, open("/proc/self/mountinfo") as mounts:
        unified, legacy = find(memberships.read(), mounts.read())
    if unified is not None and os.access(os.path.join(unified, "cgroup.subtree_control"), os.W_OK):
        available = " ".join(_lines(os.path.join(unified, "cgroup.controllers"))).split()
        if held := frozenset(available) & frozenset(CONTROLLERS):
            return 2, held
    held = frozenset(name for name, path in legacy.items() if os.access(path, os.W_OK))
    return (1 if held else 0), held
