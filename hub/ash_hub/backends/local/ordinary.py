"""Machines of a hive that an ordinary user runs: their users, what their roots begin as, their plans."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.plan import Identity, Mount, Plan, Subordinate
from ash_hub.backends.local.limits import Enforcement, Limits
from ash_hub.backends.local.machine import Machine, MachinePlans
from ash_hub.backends.local.machine_base import Entry
from ash_hub.backends.local.plans import HostFacts
from ash_hub.backends.local.runtime import Runtime
from ash_hub.backends.local.subordinates import ranges_in, runs_of
from ash_mcp.types import SandboxSpec

__all__ = ["OrdinaryMachine", "OrdinaryPlans", "files_for", "name_of_copy", "with_ranges"]

_FORMAT = 1
"""Counts what this module and the program that copies make of the same host."""
_STATE_OF_PACKAGES = (
    *("/var/lib/dpkg/status", "/var/lib/rpm", "/usr/lib/sysimage/rpm", "/var/lib/pacman/local"),
    *("/lib/apk/db/installed", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/local/bin", "/usr/local/lib"),
)
"""What changes when packages of the host do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrdinaryMachine:
    """What the machines of an ordinary user's hive are made of."""

    users: Subordinate
    block: tuple[int, int] = (0, 0)
    """The host's users that ranges are taken from; (0, 0): root inside is the hive's user."""
    each: int = 1
    """How many of them a sandbox has."""
    lock: str | None = None
    """The file by which ranges are locked."""
    lacks: str | None = None
    """Why sandboxes have no users of their own, and what to do."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Files of /etc that say which users there are."""


class OrdinaryPlans(MachinePlans):
    """Each sandbox is root of a machine whose root file system begins as a copy of the host's. `base` is that copy."""

    def __init__(
        self, host: HostFacts, enforcement: Enforcement, directory: Path, base: str, machine: OrdinaryMachine
    ) -> None:
        super().__init__(host, enforcement, directory, Machine(base=base, user_block=machine.block))
        self._ordinary = machine

    @property
    def warnings(self) -> Sequence[str]:
        found = list(super().warnings)
        if self._ordinary.lacks is not None:
            found.append(
                "root inside is the hive's own user and there is no other: chown, su and packages that bring users "
                "fail, and what the kernel gives to each user all sandboxes share. " + self._ordinary.lacks
            )
        return found

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        machine = self._ordinary
        given = super().plan(spec, runtime, limits)
        environment = {**given.environment, "TAR_OPTIONS": "--no-same-owner"}
        return replace(
            given,
            environment=environment,
            identity=Identity(uid=0, gid=0, users=machine.each),
            subordinate=machine.users,
            user_lock=machine.lock,
        )

    def _roots(self) -> Iterator[Mount]:
        yield Mount("writable", "/", self._machine.base)
        for path, text in self._ordinary.files.items():
            yield Mount("file", path, content=text.encode(), mode="0644")


def with_ranges(users: Subordinate, lock: Path, sandboxes: int) -> OrdinaryMachine:
    """Return machines with users of their own, for a hive of so many sandboxes."""
    each, _ = ranges_in(users.size, sandboxes)
    runs = runs_of(each)
    return OrdinaryMachine(
        users=users._replace(runs=runs),
        block=(users.first_user + 1, users.size - 1),
        each=each,
        lock=str(lock),
        files=files_for(runs),
    )


def files_for(runs: Sequence[tuple[int, int]], etc: Path = Path("/etc")) -> dict[str, str]:
    """Return the files that make programs choose users that there are, by the runs of a sandbox's range.

    With root alone, package managers are told to stay root.
    """
    if len(runs) == 1:
        return {"/etc/apt/apt.conf.d/96ash-user": 'APT::Sandbox::User "root";\n'}
    (system, systems), (own, owns) = runs[-3], runs[-2]
    bounds = {"SYS": (system, system + systems - 1), "": (own, own + owns - 1)}
    found: dict[str, str] = {}
    login = {f"{kind}{name}": str(bounds["SYS" if kind[:3] == "SYS" else ""][name == "MAX"]) for kind, name in _LOGIN}
    found["/etc/login.defs"] = _with_values(_text(etc / "login.defs"), login, " ")
    adduser = {
        f"{end}_{kind}": str(bounds["SYS" if kind[:3] == "SYS" else ""][end == "LAST"])
        for end in ("FIRST", "LAST")
        for kind in ("SYSTEM_UID", "SYSTEM_GID", "UID", "GID")
    }
    found["/etc/adduser.conf"] = _with_values(_text(etc / "adduser.conf"), adduser, "=")
    return found


_LOGIN = tuple((kind, name) for kind in ("SYS_UID_", "SYS_GID_", "UID_", "GID_") for name in ("MIN", "MAX"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _with_values(text: str, values: Mapping[str, str], between: str) -> str:
    """Return a configuration in which these names have these values, and no others."""
    other = re.compile(rf"^\s*(?:{'|'.join(values)})\b")
    kept = [line for line in text.splitlines() if not other.match(line)]
    return "\n".join([*kept, *(f"{name}{between}{value}" for name, value in values.items())]) + "\n"


def name_of_copy(entries: Mapping[str, Entry], users: Subordinate, without: Sequence[str]) -> str:
    """Return the name of the copy of this host's system as it is now, for these users.

    Args:
        entries: What is in it beside the system.
        without: Paths that are left out.
    """
    state: list[object] = [_FORMAT, users.first_user if users.size else -os.geteuid(), sorted(without)]
    for path in _STATE_OF_PACKAGES:
        try:
            found = os.stat(path)
        except OSError:
            continue
        state.append((path, found.st_mtime_ns, found.st_size))
    state.append(sorted(entries.items()))
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
