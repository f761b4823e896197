"""Launchers: each starts a sandbox's processes from a plan and gives back a handle on them.

    plan.py              what is to be started, as plain data
    launcher.py          the Protocols: `Launcher`, one verb, and the `Handle` that it returns
    process.py           a process of this host as a handle: pipes, limits, control groups
    init.py              the first process of every sandbox, a program of its own
    bubblewrap.py        a launcher that isolates: namespaces, a root of its own, a system call filter
    mount_names.py       what it mounts before: host directories under names that tell nothing, sealed device nodes
    staging.py           the same for a sandbox with users of its own: their namespace, writable roots
    layers.py            file systems that outlive the sandbox which writes to them, for others to stand on
    layer_copy.py        a copy of them, by a process that sees nothing else
    bubblewrap_trial.py  for the hub: which bubblewrap this host has, and whether it works
    unsafe.py            a launcher that isolates nothing
    fork/                a launcher that forks a warm process, behind the same walls as bubblewrap's
    rlimits.py           limits of a process

They run in the keeper, so on the standard library alone. `launcher_of` is the only place that knows them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bubblewrap import BubblewrapLauncher
from .fork.parents import ForkLauncher, ForkParents
from .launcher import Handle, Launcher, LaunchError
from .plan import Plan
from .unsafe import UnsafeLauncher

__all__ = ["ForkParents", "Handle", "LaunchError", "Launcher", "Plan", "launcher_of"]


def launcher_of(choice: Mapping[str, Any], parents: ForkParents | None = None) -> Launcher:
    """Return the launcher that a hub chose: its `kind`, and what else that one is made with.

    Args:
        parents: What forks, for a choice of that kind.

    Raises:
        LaunchError: There is no such launcher.
    """
    match choice:
        case {"kind": "bubblewrap", "program": program, "options": options}:
            return BubblewrapLauncher(program, frozenset(options))
        case {"kind": "fork", "key": key, "is_loaded": is_loaded, "otherwise": other} if parents is not None:
            otherwise = None if other is None else launcher_of(other)
            return ForkLauncher(parents, key, otherwise, is_loaded=is_loaded)
        case {"kind": "unsafe"}:
            return UnsafeLauncher()
        case _:
            raise LaunchError("launch", f"this keeper has no launcher {choice.get('kind')!r}")
