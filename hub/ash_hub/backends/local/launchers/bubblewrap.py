"""Plans for bubblewrap: a root of its own, new namespaces, no capabilities, a system call filter. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ash_hub.backends.local.keeper.sandbox import OUTLET_NAME
from ash_hub.backends.local.launchers.base import INIT, OUTLET, HostFacts, Plan, runner_config
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.runtime import PYTHON_DIRECTORY, Runtime
from ash_mcp.types import SandboxSpec

__all__ = ["HOME", "WORKSPACE", "BubblewrapLauncher"]

HOME = "/home/ash"
WORKSPACE = "/workspace"
_INIT_PATH = "/opt/ash/init.py"
_ID = "1000"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

ETC = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nash:x:1000:1000:ash:/home/ash:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nash:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "hostname": "sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    "resolv.conf": "",
}
"""Files of /etc that are the same in every sandbox."""

_ETC_FROM_HOST = (
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
"""What programs of /usr need of the host's /etc, and that says nothing about its users."""


class BubblewrapLauncher:
    """Starts every sandbox in namespaces of its own."""

    def __init__(self, host: HostFacts, enforcement: Enforcement, directory: Path) -> None:
        self._host = host
        self._directory = directory
        self._enforcement = enforcement

    @property
    def warnings(self) -> Sequence[str]:
        found = self._enforcement.warnings()
        if "--size" not in self._host.options:
            found.append("disk space is bounded by memory only: bubblewrap 0.7 or later can limit it")
        if self._host.seccomp is None:
            found.append("system calls are not filtered: there is no filter for this machine's architecture")
        return found

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        """Return how to start `spec`."""
        files = {f"etc.{name}": text.encode() for name, text in ETC.items()}
        files["init"] = INIT.read_bytes()
        if runtime.hidden:
            files |= {f"hidden.{number}": b"" for number in range(len(runtime.hidden))}
        if self._host.seccomp is not None:
            files["seccomp"] = self._host.seccomp
        veils = self._veils([*runtime.binds.values(), *spec.mounts.values()])
        shown = {directory: target for target, directory in veils}
        binds = {inside: shown.get(out, out) for inside, out in {**runtime.binds, **spec.mounts}.items()}
        args = [
            *self._isolation(),
            *self._system(),
            *_etc(),
            *_runtime(runtime, binds),
            *self._own(limits),
            *self._outlet(spec),
            *_environment(spec, runtime),
            *("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"),
            *("--chdir", WORKSPACE),
        ]
        processes = limits.processes if self._enforcement.inner_processes else 0
        init = (runtime.python, "-I", "-S", _INIT_PATH, "@fd:up@", str(processes), "ns")
        return Plan(
            argv=(
                *(self._host.bubblewrap, "--args", "@fd:args@", "--"),
                *init,
                *(runtime.python, *runtime.arguments),
            ),
            args=tuple(args),
            files=files,
            rlimits=self._enforcement.rlimits(limits),
            veils=veils,
        )

    def _veils(self, directories: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Return where the keeper shall show each directory, so that no sandbox learns where it lies."""
        found = sorted(set(directories)) if self._host.veils else []
        return tuple((str(self._directory / "v" / str(number)), path) for number, path in enumerate(found))

    def _isolation(self) -> Iterator[str]:
        yield from ("--unshare-all", "--unshare-user", "--uid", _ID, "--gid", _ID, "--hostname", "sandbox")
        yield from ("--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL")
        yield from ("--json-status-fd", "@fd:status@")
        if "--disable-userns" in self._host.options:
            yield "--disable-userns"
        if self._host.seccomp is not None:
            yield from ("--seccomp", "@fd:seccomp@")

    def _system(self) -> Iterator[str]:
        for path in self._host.directories:
            yield from ("--ro-bind", path, path)
        for path, target in self._host.links.items():
            yield from ("--symlink", target, path)
        yield from ("--proc", "/proc", "--dev", "/dev")
        for path in self._host.masked:
            yield from ("--ro-bind", "/dev/null", path)
        yield from ("--dir", "/run", "--dir", "/var", "--symlink", "../run", "/var/run")
        yield from ("--symlink", "../tmp", "/var/tmp", "--dir", "/root")

    def _own(self, limits: Limits) -> Iterator[str]:
        """Yield the places that the sandbox can write to."""
        yield from self._writable("/tmp", limits.tmp_bytes, "1777")
        yield from self._writable("/dev/shm", limits.shm_bytes, "1777")
        yield from self._writable(HOME, limits.home_bytes, "0700")
        yield from self._writable(WORKSPACE, limits.workspace_bytes, "0755")

    def _outlet(self, spec: SandboxSpec) -> Iterator[str]:
        if spec.network != "none":
            yield from ("--ro-bind", str(self._directory / "e" / spec.id), OUTLET)

    def _writable(self, path: str, size: int, mode: str) -> Iterator[str]:
        if "--size" in self._host.options:
            yield from ("--size", str(size))
        yield from ("--perms", mode, "--tmpfs", path)


def _etc() -> Iterator[str]:
    for name in ETC:
        yield from ("--perms", "0644", "--file", f"@fd:etc.{name}@", f"/etc/{name}")
    for path in _ETC_FROM_HOST:
        yield from ("--ro-bind-try", path, path)


def _runtime(runtime: Runtime, binds: Mapping[str, str]) -> Iterator[str]:
    for inside, outside in binds.items():
        yield from ("--ro-bind", outside, inside)
    for number, path in enumerate(runtime.hidden):
        yield from ("--ro-bind-data", f"@fd:hidden.{number}@", path)
    yield from ("--perms", "0644", "--file", "@fd:init@", _INIT_PATH)


def _environment(spec: SandboxSpec, runtime: Runtime) -> Iterator[str]:
    egress = f"{OUTLET}/{OUTLET_NAME}" if spec.network != "none" else None
    config = runner_config(spec, workspace=WORKSPACE, home=HOME, egress=egress)
    variables = {
        "PATH": f"{_PATH}:{PYTHON_DIRECTORY}/bin" if PYTHON_DIRECTORY in runtime.binds else _PATH,
        "HOME": HOME,
        "USER": "ash",
        "LOGNAME": "ash",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "TERM": "xterm-256color",
        "TMPDIR": "/tmp",
        "PYTHONPATH": ":".join(runtime.python_path),
        "ASH_LISTEN_FD": "@fd:listen@",
        "ASH_RUNNER_CONFIG": json.dumps(config, separators=(",", ":")),
    }
    if runtime.library_path:
        variables["LD_LIBRARY_PATH"] = ":".join(runtime.library_path)
    for key, value in variables.items():
        yield from ("--setenv", key, value)
