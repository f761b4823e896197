"""Protections of the local backend, taken away.

Each is a change of a launch plan, of bubblewrap's options, of a setting, a policy or the hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ash_hub.backends.local import seccomp
from ash_hub.backends.local._syscalls import ARCHITECTURES, Architecture
from ash_hub.backends.local.keeper.launchers import process
from ash_hub.backends.local.keeper.launchers.plan import Mount, Plan
from ash_hub.backends.local.limits import Limits
from ash_hub.backends.local.plans import Plans
from ash_hub.backends.local.runtime import Runtime
from ash_hub.testing.escapes import Bait
from ash_hub.testing.escapes.kernel import FILTERED
from ash_mcp.types import SandboxSpec

MIB = 1024 * 1024
_NAMESPACES = ("user", "ipc", "pid", "net", "uts", "cgroup")
_ARCHITECTURE = ARCHITECTURES.get(os.uname().machine, Architecture(0, {}))
_INSTRUCTION = 8


@dataclass(frozen=True)
class Place:
    """Where things are in a test."""

    root: Path
    run_dir: str
    bait: Bait


Change = Callable[[Plan, Place], Plan]
Edit = tuple[Sequence[str], Sequence[str], int]
"""Words of bubblewrap's options, what stands in their place, and how many operands after them go, too."""
WEAK_BUBBLEWRAP = """
import json, os, sys
edits, leaks, program, _, number, *rest = sys.argv[1:]
words = [word.decode() for word in open(int(number), "rb").read().split(b"\\0")[:-1]]
for old, new, operands in json.loads(edits):
    for position in range(len(words) - len(old), -1, -1):
        if words[position : position + len(old)] == old:
            words[position : position + len(old) + operands] = new
given = os.memfd_create("args", 0)
os.write(given, b"".join(word.encode() + b"\\0" for word in words))
os.lseek(given, 0, os.SEEK_SET)
for text in json.loads(leaks):
    os.write(os.memfd_create("leak", 0), text.encode())
os.execv(program, [program, "--args", str(given), *rest])
"""
"""Becomes bubblewrap with other options than it was given, and with descriptors for whoever looks."""


@dataclass(frozen=True)
class Removal:
    """How one protection is taken away."""

    change: Change = lambda plan, _: plan
    edits: Callable[[Place], Sequence[Edit]] = lambda _: ()
    leaks: Sequence[str] = ()
    """What is in descriptors that sandboxes inherit."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    network: Callable[[Place], tuple[str, ...]] | None = None
    patches: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Names in modules of the hub, and what they are without it."""
    root_only: str | None = None
    """Why only root's sandboxes can be without it, or gain by it."""


def _edited(*edits: Edit, root_only: str | None = None) -> Removal:
    return Removal(edits=lambda _: edits, root_only=root_only)


def _dropped(option: str, operands: int = 0) -> Removal:
    """Leave an option of bubblewrap out."""
    return _edited(((option,), (), operands))


def _added(words: Callable[[Place], Sequence[str]]) -> Removal:
    """Mount more, over what is there."""

    def edits(place: Place) -> Sequence[Edit]:
        last = ("--remount-ro", "/proc")
        return ((last, (*words(place), *last), 0),)

    return Removal(edits=edits)


def _without(kind: str, target: str | None = None) -> Change:
    """Leave mounts of a kind out, all or at one place."""

    def change(plan: Plan, _: Place) -> Plan:
        kept = (mount for mount in plan.mounts if mount.kind != kind or target not in (None, mount.target))
        return replace(plan, mounts=tuple(kept))

    return change


def _mounts(change: Callable[[Mount], Mount]) -> Change:
    return lambda plan, _: replace(plan, mounts=tuple(change(mount) for mount in plan.mounts))


def _shared(namespace: str, *more: Edit) -> Removal:
    """Stay in one namespace of the host; each is named, so that several can be taken away together."""
    each = [f"--unshare-{name}" for name in _NAMESPACES if name != "user"]
    needed = "an ordinary user's bubblewrap cannot do without it" if namespace == "user" else None
    return _edited((("--unshare-all",), each, 0), ((f"--unshare-{namespace}",), (), 0), *more, root_only=needed)


def _unfiltered(names: Sequence[str]) -> Removal:
    def change(plan: Plan, _: Place) -> Plan:
        numbers = {name: number for name, number in _ARCHITECTURE.numbers.items() if name not in names}
        return replace(plan, system_call_filter=seccomp.build(replace(_ARCHITECTURE, numbers=numbers)))

    return Removal(change)


def _cut(first: int, last: int) -> Removal:
    """Leave instructions of the filter out, which no jump of its rest passes over."""

    def change(plan: Plan, _: Place) -> Plan:
        program = plan.system_call_filter
        assert program is not None
        return replace(plan, system_call_filter=program[: first * _INSTRUCTION] + program[last * _INSTRUCTION :])

    return Removal(change)


def _init_readable(plan: Plan, _: Place) -> Plan:
    line, init = b"prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)", process.INIT.read_bytes()
    assert line in init
    other = Mount("file", "/opt/ash/init.py", content=init.replace(line, b"pass"))
    return replace(plan, mounts=(other, *plan.mounts))


_without_overlays = _mounts(lambda mount: mount._replace(overlay=None))
"""Show what is shown through overlays under the host's names, and in the host's inodes."""


def _writable_system(place: Place) -> Sequence[Edit]:
    null = ("--ro-bind", "/dev/null")
    return ((("--ro-bind",), ("--bind",), 0), (("--bind", "/dev/null"), null, 0))


_ROOTS_USERS = "only root's keeper can give a sandbox any user of the host"


def _more_users(plan: Plan, _: Place) -> Plan:
    return replace(plan, identity=replace(plan.identity, users=2 * 65_536))


def _talkative(plan: Plan, _: Place) -> Plan:
    return replace(plan, environment={**plan.environment, "HIVE_SECRET": "x"})


def _workspace(place: Place) -> Sequence[str]:
    shared = place.root / "shared"
    shared.mkdir(exist_ok=True)
    return ("--bind", str(shared), "/workspace")


def _unbounded(*_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _named(place: Place) -> tuple[str, ...]:
    here = f"127.0.0.1:{place.bait.port}"
    return (here, f"localhost={here}", f"door.test={here}")


_ROOTS_DEVICES = "the devices belong to root, so an ordinary user's sandbox could not open them anyway"
_ROOTS_FILES = "the files belong to root, so an ordinary user's sandbox could not write them anyway"

CLAIMS: Mapping[str, Any] = {
    "own_files": True,
    "own_devices": True,
    "inotify_instances": 8,
    "epoll_watches": 1000,
    "terminals": 8,
    "pipe_pages": 600,
    "descriptors_in_flight": 300,
}
"""Bounds that this backend lacks, on some hosts or on all: attempts on them are made as if it had said otherwise."""

REMOVALS: Mapping[str, Removal] = {
    "own /tmp": _added(lambda _: ("--ro-bind", "/tmp", "/tmp")),
    "own homes": _added(lambda place: ("--ro-bind", place.bait.home, "/root")),
    "own /etc": _added(lambda _: ("--ro-bind", "/etc", "/etc")),
    "empty files of installations": Removal(_without("covered")),
    "hidden paths": Removal(_without_overlays),
    "read-only system": Removal(_without_overlays, _writable_system, root_only=_ROOTS_FILES),
    "read-only root": Removal(_without("read_only", "/")),
    "read-only /dev": Removal(_without("read_only", "/dev")),
    "read-only /proc": Removal(_without("read_only", "/proc"), root_only=_ROOTS_FILES),
    "masked files of /proc": Removal(_without("masked")),
    "no /sys": _added(lambda _: ("--ro-bind", "/sys", "/sys")),
    "own /dev": Removal(
        _without("read_only", "/dev"),  # made read-only, a bind loses its devices
        lambda _: ((("--dev", "/dev"), ("--dev-bind", "/dev", "/dev"), 0),),
        root_only=_ROOTS_DEVICES,
    ),
    "sealed device nodes": Removal(_mounts(lambda mount: mount._replace(sealed=False))),
    "user namespace": _shared("user", (("--uid",), (), 1), (("--gid",), (), 1), (("--disable-userns",), (), 0)),
    "process namespace": _shared("pid", (("--as-pid-1",), (), 0)),
    "network namespace": _shared("net"),
    "ipc namespace": _shared("ipc"),
    "uts namespace": _shared("uts", (("--hostname",), (), 1)),
    "control group namespace": _shared("cgroup"),
    "no nested user namespaces": _dropped("--disable-userns"),
    "no capabilities": _edited((("--cap-drop", "ALL"), ("--cap-add", "ALL"), 0)),
    "own first process": _dropped("--as-pid-1"),
    "closed first process": Removal(_init_readable),
    "clean environment": Removal(_talkative),
    "no other descriptors": Removal(leaks=("HIVE_SECRET",)),
    "sockets out of sight": _added(lambda place: ("--bind", place.run_dir, place.run_dir)),
    "own workspace": _added(_workspace),
    "users of its own": Removal(lambda plan, _: replace(plan, user_block=(0, 65_536)), root_only=_ROOTS_USERS),
    "a range of users": Removal(_more_users, root_only=_ROOTS_USERS),
    "pinned folders": Removal(_without("pinned")),
    "a read-only runner": Removal(_without("read_only", "/opt/ash")),
    "filter: terminals": _unfiltered(("ioctl",)),
    "filter: socket families": _unfiltered(("socket",)),
    "filter: socket protocols": _unfiltered(("socket",)),
    "filter: socket pairs": _unfiltered(("socketpair",)),
    "filter: file controls": _unfiltered(("fcntl",)),
    "filter: core limit": _unfiltered(("setrlimit", "prlimit64")),
    "filter: other architectures": _cut(1, 3),
    "filter: x32": _cut(4, 6),
    **{protection: _unfiltered(tuple(calls)) for protection, calls in FILTERED.items()},
    "core limit": Removal(lambda plan, _: replace(plan, rlimits={**plan.rlimits, "CORE": 0})),
    "inodes of its own": Removal(_without_overlays),
    "devices of its own": Removal(),
    "quotas of its own": Removal(),
    "process limit": Removal(settings={"max_processes": 4000}),
    "open files limit": Removal(settings={"open_files": 2048}),
    "sizes of places": Removal(_mounts(lambda mount: mount._replace(size=None))),
    "processor limit": Removal(settings={"cpu": None}),
    "memory limit": Removal(settings={"memory_bytes": 2048 * MIB}),
    "bounded log": Removal(settings={"log_bytes": 1024 * MIB}),
    "bounded answers": Removal(patches={"ash_hub.spawning.sandbox_requests.MAX_LIST_BYTES": 1 << 40}),
    "bounded values": Removal(patches={"ash_hub.spawning.sandbox_requests.MAX_LIST_VALUES": 1 << 40}),
    "bounded pages": Removal(patches={"ash_hub.spawning.sandbox_requests.MAX_LIST_PAGES": 1 << 40}),
    "one time for an answer": Removal(patches={"ash_hub.spawning.sandbox_requests.within": _unbounded}),
    "egress policy": Removal(network=_named),
    "no proxy without a policy": Removal(network=lambda _: ("example.com",)),
}

INHERENT: Mapping[str, str] = {
    "no new privileges": "bubblewrap sets it for every sandbox and has no option to leave it out",
    "relative socket names": "the keeper binds in its own directory; no plan can make it do otherwise",
    "folders of the base": "an overlay moves no folder of its lower layer, whatever is mounted on it",
    "HTTP parser": "the hub's HTTP client reads no other protocol, and no head without an end",
    "requests to one endpoint": "a client of the hub has the sandbox's own socket and no other way to connect",
    "egress: one form of an address": "no policy can allow what the proxy's parser refuses",
    "egress: nothing unread before the server answers": "the proxy reads a tunnel's first hello whatever the policy",
}
"""Protections that no plan, setting, policy or name takes away."""

BACKED_UP: Mapping[str, str] = {
    "no nested user namespaces": "the filter's part for namespaces stops the same; both are taken away together",
    "pinned folders": "an overlay moves no folder that is in the base; `test_machine.py` has one that is not",
    "bounded pages": "the time for an answer, which all pages share, stops the same; both are taken away together",
}
"""Protections behind others, so that nothing escapes by the loss of one of them alone."""


@dataclass(frozen=True)
class Weakened:
    """Plans without some protections, for a bubblewrap without some."""

    plans: Plans
    removals: Sequence[Removal]
    place: Place

    @property
    def launcher(self) -> Mapping[str, Any]:
        given = self.plans.launcher
        edits = [edit for removal in self.removals for edit in removal.edits(self.place)]
        leaks = [text for removal in self.removals for text in removal.leaks]
        if not edits and not leaks:
            return given
        program = self.place.root / "weak-bubblewrap"
        words = [json.dumps(edits), json.dumps(leaks), given["program"]]
        python = [sys.executable, "-I", "-S", "-c", WEAK_BUBBLEWRAP, *words]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(python)} "$@"\n')
        program.chmod(0o700)
        return {**given, "program": str(program)}

    @property
    def warnings(self) -> Sequence[str]:
        return self.plans.warnings

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        plan = self.plans.plan(spec, runtime, limits)
        for removal in self.removals:
            plan = removal.change(plan, self.place)
        return plan
