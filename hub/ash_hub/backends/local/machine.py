"""Plans of ordinary machines: root inside, with users and a writable root of its own, where the host lets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.plan import Identity, Mount, Plan
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.plans import WORKSPACE, HostFacts, IsolatedPlans
from ash_hub.backends.local.runtime import RUNTIME_DIRECTORY, Runtime
from ash_hub.backends.local.settings import USERS_EACH
from ash_mcp.types import SandboxSpec

__all__ = ["CAPABILITIES", "MACHINE_HOME", "SHOWN", "WAY_OUT", "Machine", "MachinePlans"]

MACHINE_HOME = "/root"
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "SYS_CHROOT"),
    "NET_BIND_SERVICE",
)
"""What root has inside, over what is the sandbox's own. Never SYS_ADMIN, with which it could mount and unmount."""
_PACKAGES = "/var/lib/dpkg"
SHOWN = ("/etc/alternatives", "/etc/ssl/certs", _PACKAGES)
"""Directories of the host beside `/usr` that belong to its packages, and have too many files to be copied."""
_PROXY = "http://127.0.0.1:3128"
_RUNTIME_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What plans of machines need to know beside the host's facts."""

    base: str
    """The directory that every root begins as."""
    user_block: tuple[int, int]
    """The first of the host's users for sandboxes, and how many there are."""
    shown: tuple[str, ...] = ()
    """Those of `SHOWN` that the host has."""
    snapshots: bool = False
    """Whether the host lets what they write be frozen."""


class MachinePlans(IsolatedPlans):
    """Each sandbox is root of a machine of its own. `runtime` must be one that the host's `/usr` is no part of."""

    def __init__(self, host: HostFacts, enforcement: Enforcement, directory: Path, machine: Machine) -> None:
        super().__init__(host, enforcement, directory)
        self._machine = machine

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        given = super().plan(spec, runtime, limits)
        mounts = list(self._mounts(spec, runtime, limits))
        return replace(
            given,
            command=(*runtime.loader, *given.command),
            loader=runtime.loader,
            environment={**given.environment, **_ENVIRONMENT},
            mounts=tuple(_pinned(mounts)),
            identity=Identity(uid=0, gid=0, users=USERS_EACH),
            capabilities=CAPABILITIES,
            user_block=self._machine.user_block,
            in_use=(self._machine.base,),
            writable_bytes=limits.root_bytes,
            snapshots=self._machine.snapshots,
        )

    @property
    def home(self) -> str:
        return MACHINE_HOME

    def _mounts(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Iterator[Mount]:
        yield from self._roots()
        # Else a sandbox that is started anew would load into its own runner what was named there in an earlier life.
        yield Mount("file", "/etc/ld.so.preload", mode="0644")
        yield from self._usual_places(spec, runtime, limits)
        kept = "kept" if self._machine.snapshots else "tmpfs"
        yield Mount(kept, MACHINE_HOME, size=limits.home_bytes, mode="0700")
        yield Mount(kept, WORKSPACE, size=limits.workspace_bytes, mode="0755")
        yield from self._outlet(spec)
        if spec.network != "none":
            for path, text in WAY_OUT.items():
                yield Mount("file", path, content=text.encode(), mode="0644")
        yield from (Mount("read_only", path) for path in ("/proc", "/dev", RUNTIME_DIRECTORY))

    def _usual_places(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Iterator[Mount]:
        """Yield what is mounted over any root: the kernel's files, the runner's, and what lies in memory."""
        yield from (Mount("proc", "/proc"), Mount("devices", "/dev", sealed=self._host.seals))
        for path in self._host.masked:
            yield Mount("masked", path)
        yield Mount("tmpfs", RUNTIME_DIRECTORY, size=_RUNTIME_BYTES, mode="0755")
        for inside, outside in {**runtime.binds, **spec.mounts}.items():
            yield Mount("bind", inside, outside, overlay=outside)
        for path in runtime.hidden:
            yield Mount("covered", path)
        yield Mount("tmpfs", "/tmp", size=limits.tmp_bytes, mode="1777")
        yield Mount("tmpfs", "/dev/shm", size=limits.shm_bytes, mode="1777")

    def _roots(self) -> Iterator[Mount]:
        """Yield what of the file system is written to."""
        yield Mount("writable", "/", self._machine.base)
        yield Mount("writable", "/usr", "/usr")
        for path in self._machine.shown:
            yield Mount("writable", path, path)
        if _PACKAGES in self._machine.shown:
            # It names users of the host, without whom dpkg refuses to work.
            yield Mount("file", f"{_PACKAGES}/statoverride", mode="0644")


_ENVIRONMENT: Mapping[str, str] = {
    "USER": "root",
    "LOGNAME": "root",
    "DEBIAN_FRONTEND": "noninteractive",
    # The whole machine is for this one task, so its Python may be changed.
    "PIP_BREAK_SYSTEM_PACKAGES": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
WAY_OUT: Mapping[str, str] = {
    "/etc/environment": "".join(
        f'{name}="{value}"\n'
        for upper, value in (("HTTP_PROXY", _PROXY), ("HTTPS_PROXY", _PROXY), ("NO_PROXY", "localhost,127.0.0.1,::1"))
        for name in (upper, upper.lower())
    ),
    "/etc/apt/apt.conf.d/95ash-proxy": f'Acquire::http::Proxy "{_PROXY}";\nAcquire::https::Proxy "{_PROXY}";\n',
}
"""For what starts with a clean environment: `su -`, and apt where it was started by that."""


def _pinned(mounts: list[Mount]) -> Iterator[Mount]:
    """Yield the mounts, and before those of the host each directory above, so that nobody inside can move it away.

    A directory that something is mounted on stays in its place; one further up could be renamed, and another put there
    for the runner to find.
    """
    fixed = {"/", *(mount.target for mount in mounts if mount.kind != "file")}
    for mount in mounts:
        if mount.kind in ("bind", "tmpfs", "kept", "covered"):
            for above in _directories_above(mount.target):
                if above not in fixed:
                    fixed.add(above)
                    if not above.startswith(f"{RUNTIME_DIRECTORY}/"):
                        yield Mount("pinned", above)
        yield mount


def _directories_above(path: str) -> list[str]:
    """Return the directories that an absolute path passes through, from the second one on."""
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[: number + 1]) for number in range(len(parts))]
