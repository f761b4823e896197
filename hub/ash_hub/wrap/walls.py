"""The walls of a wrapped server, as the plan of a launch. Pure: nothing is started.

They are those of a hive's sandbox with a read-only system: namespaces, a filter of system calls, a root of its own.
The server has its own places to write to, which are gone with it, and what was named of the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.plan import Identity, Mount, Plan
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.plans import HOME, SYSTEM_PATH, WORKSPACE, HostFacts, IsolatedPlans, writable_places
from ash_hub.backends.local.runtime import PYTHON_DIRECTORY, Runtime
from ash_hub.wrap.request import Folder

__all__ = ["PROXY_VARIABLES", "Contents", "WrapPlans", "with_streams"]

_OPEN_FILES = 4096
_PROCESSES = 512
_SHM_BYTES = 64 * 1024 * 1024
_PROXY = "http://127.0.0.1:3128"
PROXY_VARIABLES: Mapping[str, str] = {
    name: value
    for upper, value in (("HTTP_PROXY", _PROXY), ("HTTPS_PROXY", _PROXY), ("NO_PROXY", "localhost,127.0.0.1,::1"))
    for name in (upper, upper.lower())
} | {"NODE_USE_ENV_PROXY": "1"}
"""How programs find the egress proxy, which listens at the port that `init.py` knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is inside one server's walls."""

    words: tuple[str, ...]
    """The command, by paths inside."""
    shown: Mapping[str, str] = field(default_factory=dict[str, str])
    """Read-only: path inside -> path on the host, of programs and packages."""
    folders: Sequence[Folder] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    search: Sequence[str] = ()
    """Directories that `PATH` begins with."""
    has_network: bool = False
    memory_bytes: int = 2 * 1024**3
    directory: str = WORKSPACE
    """Where it starts."""


class WrapPlans(IsolatedPlans):
    """Plans of wrapped servers. `runtime` brings the Python of the first process, and nothing else."""

    def __init__(self, host: HostFacts, enforcement: Enforcement, runtime: Runtime, loader: tuple[str, ...]) -> None:
        super().__init__(host, enforcement, Path("/"))
        self._runtime = runtime
        self._loader = loader

    def plan_of(self, contents: Contents, filled: Mapping[str, str] | None = None) -> Plan:
        """Return the plan.

        Args:
            filled: What is written to as it is, too: path inside -> path on the host.
        """
        quarter = contents.memory_bytes // 4
        limits = Limits(
            memory_bytes=contents.memory_bytes,
            cpu=None,
            processes=_PROCESSES,
            open_files=_OPEN_FILES,
            workspace_bytes=quarter,
            home_bytes=quarter,
            tmp_bytes=quarter,
            shm_bytes=_SHM_BYTES,
        )
        rlimits = self._enforcement.rlimits(limits)
        del rlimits["FSIZE"]  # a file in a folder of the host may be as large as on the host
        return Plan(
            command=contents.words,
            python=self._runtime.python,
            loader=self._loader,
            environment=_environment(contents),
            directory=contents.directory,
            mounts=(
                *self._mounts(contents, filled or {}, limits),
                *(Mount("read_only", path) for path in ("/proc", "/dev", "/")),
            ),
            identity=Identity(host_name="wrapped"),
            rlimits=rlimits,
            processes=limits.processes if self._enforcement.inner_processes else 0,
            group=self._enforcement.for_keeper(limits),
            system_call_filter=self._host.seccomp,
        )

    def _mounts(self, contents: Contents, filled: Mapping[str, str], limits: Limits) -> Iterator[Mount]:
        python = {key: value for key, value in self._runtime.binds.items() if key == PYTHON_DIRECTORY}
        binds = {**python, **contents.shown}
        system = (*self._host.directories, "/etc") if self._host.own_inodes else ()
        directories = {path for path in binds.values() if os.path.isdir(path)}
        overlaid = {*directories, *system} if self._host.overlays else set[str]()
        yield from self._system(overlaid)
        yield from self._etc(overlaid)
        yield from writable_places(limits)
        for inside, outside in binds.items():
            yield Mount("bind", inside, outside, overlay=outside if outside in overlaid else None)
        for inside, outside in filled.items():
            yield Mount("folder", inside, outside)
        for folder in contents.folders:
            yield Mount("folder" if folder.is_writable else "bind", folder.path, os.path.realpath(folder.path))


def with_streams(plan: Plan, streams: Mapping[str, int], outlet: int | None) -> Plan:
    """Return a plan whose main process has these streams, and that hands out a listener where it may go out.

    Args:
        streams: Descriptors, by `stdin`, `stdout` and `stderr`.
    """
    descriptors = {**streams, **({} if outlet is None else {"outlet": outlet})}
    variables = {f"ASH_{name.upper()}_FD": f"@fd:{name}@" for name in descriptors}
    return replace(plan, descriptors=descriptors, environment={**plan.environment, **variables})


def _environment(contents: Contents) -> dict[str, str]:
    return {
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "LOGNAME": "ash",
        "PATH": ":".join((*contents.search, SYSTEM_PATH)),
        "SHELL": "/bin/bash",
        "TMPDIR": "/tmp",
        "USER": "ash",
        **(PROXY_VARIABLES if contents.has_network else {}),
        **contents.environment,
    }
