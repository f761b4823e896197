"""Launch plans of sandboxes: what is in their file systems, environments and limits. Pure; nothing is started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ash_hub.backends.local.keeper.egress import OUTLET_NAME
from ash_hub.backends.local.keeper.launchers.plan import Mount, Plan
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.runtime import PYTHON_DIRECTORY, Runtime
from ash_hub.backends.runner import runner_config, runner_environment
from ash_mcp.types import SandboxSpec

__all__ = [
    "ETC_FROM_HOST",
    "HOME",
    "OUTLET",
    "SYSTEM_PATH",
    "WORKSPACE",
    "HostFacts",
    "IsolatedPlans",
    "Plans",
    "UnsafePlans",
    "writable_places",
]

HOME = "/home/ash"
WORKSPACE = "/workspace"
OUTLET = "/run/ash-egress"
"""The directory inside a sandbox, if it has a network, with the socket of its egress proxy."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

ETC_FROM_HOST = (
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/ca-trust/extracted",
    "/etc/pki/tls/certs",
)
"""Files of the host's /etc that programs of /usr need, and that say nothing about its users."""

_ETC = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nash:x:1000:1000:ash:/home/ash:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nash:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    "resolv.conf": "",
}
"""Files of /etc that are the same in every sandbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Facts about the host that plans and launchers depend on; found once, so that plans are pure."""

    bubblewrap: str = "/usr/bin/bwrap"
    options: frozenset[str] = frozenset()
    """The options that this bubblewrap knows, `--size` among them or not."""
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """Top-level links of a merged /usr, as `/bin` -> `usr/bin`."""
    directories: Sequence[str] = ("/usr",)
    """Top-level directories with the system's programs and libraries."""
    etc: Mapping[str, str] = field(default_factory=dict[str, str])
    """Each of `ETC_FROM_HOST` that exists, with the path that its links lead to."""
    masked: Sequence[str] = ()
    """Files of /proc that are hidden, as they tell a sandbox too much about the host."""
    seccomp: bytes | None = None
    """A BPF program; None where this architecture has none."""
    overlays: bool = False
    """Whether this user may mount overlays, which hide the path on the host of a bound directory."""
    own_inodes: bool = False
    """Whether overlays can show the system's directories, too; only device nodes have the host's inodes then."""
    seals: bool = False
    """Whether this user may bind device nodes read-only."""
    core_program: bool = False
    """Whether a sandbox's crash starts the host's program for cores: this user's hard limit, 0, does not stop it."""


class Plans(Protocol):
    """Makes the plans of sandboxes, for one launcher."""

    @property
    def launcher(self) -> Mapping[str, Any]:
        """The choice of the launcher in JSON, as `launchers.launcher_of` takes it."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """The protections that sandboxes lack on this host, a sentence each."""
        ...

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        """Return the plan of `spec`, without its network."""
        ...


class IsolatedPlans:
    """Each sandbox has a root of its own and no privileges. `directory` is the keeper's."""

    def __init__(
        self, host: HostFacts, enforcement: Enforcement, directory: Path, no_machine: str | None = None
    ) -> None:
        """Make plans; `no_machine` says why sandboxes are no machines of their own although they should be."""
        self._host = host
        self._no_machine = no_machine
        self._directory = directory
        self._enforcement = enforcement

    @property
    def launcher(self) -> Mapping[str, Any]:
        return {"kind": "bubblewrap", "program": self._host.bubblewrap, "options": sorted(self._host.options)}

    @property
    def warnings(self) -> Sequence[str]:
        found = self._enforcement.warnings()
        if self._no_machine is not None:
            found.append(f"the system is read-only, and nobody is root inside: {self._no_machine}")
        if "--size" not in self._host.options:
            found.append("disk space is bounded by memory only: bubblewrap 0.7 or later can limit it")
        if not self._host.own_inodes:
            found.append("files of the host's /usr are shared: sandboxes can watch who opens them, and lock them")
        if not self._host.seals:
            found.append("the host's device nodes can be changed: their times, and by root's sandboxes their modes")
        if self._host.core_program:
            found.append("cores go to the host's program for them: give the hive's user a hard limit on cores over 0")
        if self._host.seccomp is None:
            found.append("system calls are not filtered: there is no filter for this machine's architecture")
        return found

    @property
    def home(self) -> str:
        """Where `HOME` is inside."""
        return HOME

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        system = (*self._host.directories, "/etc") if self._host.own_inodes else ()
        shown = {*runtime.binds.values(), *spec.mounts.values(), *system} if self._host.overlays else set[str]()
        return Plan(
            command=(runtime.python, *runtime.arguments),
            python=runtime.python,
            environment=_environment(spec, runtime, self.home),
            directory=WORKSPACE,
            mounts=(
                *self._system(shown),
                *self._etc(shown),
                *_runtime(runtime, spec, shown),
                *writable_places(limits),
                *self._outlet(spec),
                *(Mount("read_only", path) for path in ("/proc", "/dev", "/")),
            ),
            rlimits=self._enforcement.rlimits(limits),
            processes=limits.processes if self._enforcement.inner_processes else 0,
            group=self._enforcement.for_keeper(limits),
            system_call_filter=self._host.seccomp,
        )

    def _system(self, shown: set[str]) -> Iterator[Mount]:
        for path in self._host.directories:
            yield _bind(path, path, shown)
        for path, target in self._host.links.items():
            yield Mount("link", path, target)
        yield from (Mount("proc", "/proc"), Mount("devices", "/dev", sealed=self._host.seals))
        for path in self._host.masked:
            yield Mount("masked", path)
        yield from (Mount("directory", "/run"), Mount("directory", "/var"), Mount("link", "/var/run", "../run"))
        yield from (Mount("link", "/var/tmp", "../tmp"), Mount("directory", "/root"))

    def _etc(self, shown: set[str]) -> Iterator[Mount]:
        for name, text in _ETC.items():
            yield Mount("file", f"/etc/{name}", content=text.encode(), mode="0644")
        for path, real in self._host.etc.items():
            above = next((directory for directory in sorted(shown) if real.startswith(f"{directory}/")), None)
            yield Mount("bind", path, real, optional=True, overlay=above)

    def _outlet(self, spec: SandboxSpec) -> Iterator[Mount]:
        if spec.network != "none":
            yield Mount("bind", OUTLET, str(self._directory / "e" / spec.id))


def _bind(inside: str, outside: str, shown: set[str]) -> Mount:
    return Mount("bind", inside, outside, overlay=outside if outside in shown else None)


def _runtime(runtime: Runtime, spec: SandboxSpec, shown: set[str]) -> Iterator[Mount]:
    for inside, outside in {**runtime.binds, **spec.mounts}.items():
        yield _bind(inside, outside, shown)
    for path in runtime.hidden:
        yield Mount("covered", path)


def writable_places(limits: Limits) -> Iterator[Mount]:
    """Yield the places that the sandbox can write to."""
    yield Mount("tmpfs", "/tmp", size=limits.tmp_bytes, mode="1777")
    yield Mount("tmpfs", "/dev/shm", size=limits.shm_bytes, mode="1777")
    yield Mount("tmpfs", HOME, size=limits.home_bytes, mode="0700")
    yield Mount("tmpfs", WORKSPACE, size=limits.workspace_bytes, mode="0755")


def _environment(spec: SandboxSpec, runtime: Runtime, home: str) -> dict[str, str]:
    egress = f"{OUTLET}/{OUTLET_NAME}" if spec.network != "none" else None
    config = runner_config(spec, workspace=WORKSPACE, home=home, egress=egress)
    library = {"LD_LIBRARY_PATH": ":".join(runtime.library_path)} if runtime.library_path else {}
    return (
        runner_environment(config, listen_descriptor="@fd:listen@")
        | library
        | {
            "PATH": f"{SYSTEM_PATH}:{PYTHON_DIRECTORY}/bin" if PYTHON_DIRECTORY in runtime.binds else SYSTEM_PATH,
            "USER": "ash",
            "LOGNAME": "ash",
            "SHELL": "/bin/bash",
            "TMPDIR": "/tmp",
            "PYTHONPATH": ":".join(runtime.python_path),
        }
    )


class UnsafePlans:
    """Sandboxes are processes of the hive's user, without isolation. `directory` is the keeper's."""

    launcher: Mapping[str, Any] = {"kind": "unsafe"}

    def __init__(self, enforcement: Enforcement, directory: Path) -> None:
        self._enforcement = enforcement
        self._directory = directory

    @property
    def warnings(self) -> Sequence[str]:
        return [
            "unsafe: this sandbox is not isolated; what runs in it can do all that the hive's own user can do",
            *self._enforcement.warnings(),
        ]

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        place = self._directory / "w" / spec.id
        workspace, home = str(place / "workspace"), str(place / "home")
        variables = runner_environment(
            runner_config(spec, workspace=workspace, home=home), listen_descriptor="@fd:listen@"
        )
        rlimits = {key: value for key, value in self._enforcement.rlimits(limits).items() if key != "DATA"}
        return Plan(
            command=(runtime.host_python, *runtime.arguments),
            python=runtime.host_python,
            environment=variables | {"PATH": os.defpath, "PYTHONPATH": ":".join(runtime.host_python_path)},
            directory=workspace,
            own_directories=(str(place), workspace, home),
            rlimits=rlimits,
            group=self._enforcement.for_keeper(limits),
        )
