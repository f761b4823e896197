"""Protections of the local backend, taken away: each is a change of a launch plan, a setting, a policy or the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ash_hub.backends.local import seccomp
from ash_hub.backends.local._syscalls import ARCHITECTURES, Architecture
from ash_hub.backends.local.launchers.base import Launcher, Plan
from ash_hub.backends.local.limits import Limits
from ash_hub.backends.local.runtime import Runtime
from ash_hub.escapes import Bait
from ash_hub.escapes.kernel import FILTERED
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


@dataclass(frozen=True)
class Removal:
    """How one protection is taken away."""

    change: Change = lambda plan, _: plan
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    network: Callable[[Place], tuple[str, ...]] | None = None
    patches: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Names in modules of the hub, and what they are without it."""
    root_only: str | None = None
    """Why only root's sandboxes can be without it, or gain by it."""


def _dropped(option: str, operands: int = 0, *, first: str | None = None) -> Change:
    """Leave an option out, wherever it has `first` as its first operand."""

    def change(plan: Plan, _: Place) -> Plan:
        args, position = list(plan.args), 0
        while position < len(args):
            if args[position] == option and (first is None or args[position + 1] == first):
                del args[position : position + 1 + operands]
            else:
                position += 1
        return replace(plan, args=tuple(args))

    return change


def _added(words: Callable[[Place], Sequence[str]]) -> Change:
    """Mount more, over what is there."""

    def change(plan: Plan, place: Place) -> Plan:
        position = plan.args.index("--setenv")
        return replace(plan, args=(*plan.args[:position], *words(place), *plan.args[position:]))

    return change


def _replaced(old: Sequence[str], new: Sequence[str]) -> Change:
    def change(plan: Plan, _: Place) -> Plan:
        args = list(plan.args)
        for position in range(len(args) - len(old), -1, -1):
            if args[position : position + len(old)] == list(old):
                args[position : position + len(old)] = new
        return replace(plan, args=tuple(args))

    return change


def _together(*changes: Change) -> Change:
    def change(plan: Plan, place: Place) -> Plan:
        for one in changes:
            plan = one(plan, place)
        return plan

    return change


def _shared(namespace: str, *more: Change) -> Removal:
    """Stay in one namespace of the host; what was left out before stays left out."""

    def change(plan: Plan, _: Place) -> Plan:
        args = list(plan.args)
        if "--unshare-all" in args:
            position = args.index("--unshare-all")
            args[position : position + 1] = [f"--unshare-{name}" for name in _NAMESPACES if name != "user"]
        args = [word for word in args if word != f"--unshare-{namespace}"]
        return replace(plan, args=tuple(args))

    needed = "an ordinary user's bubblewrap cannot do without it" if namespace == "user" else None
    return Removal(_together(change, *more), root_only=needed)


def _unfiltered(names: Sequence[str]) -> Removal:
    def change(plan: Plan, _: Place) -> Plan:
        numbers = {name: number for name, number in _ARCHITECTURE.numbers.items() if name not in names}
        return replace(plan, files={**plan.files, "seccomp": seccomp.build(replace(_ARCHITECTURE, numbers=numbers))})

    return Removal(change)


def _cut(first: int, last: int) -> Removal:
    """Leave instructions of the filter out, which no jump of its rest passes over."""

    def change(plan: Plan, _: Place) -> Plan:
        program = plan.files["seccomp"]
        kept = program[: first * _INSTRUCTION] + program[last * _INSTRUCTION :]
        return replace(plan, files={**plan.files, "seccomp": kept})

    return Removal(change)


def _init_readable(plan: Plan, _: Place) -> Plan:
    line = b"prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)"
    assert line in plan.files["init"]
    return replace(plan, files={**plan.files, "init": plan.files["init"].replace(line, b"pass")})


def _writable_system(plan: Plan, _: Place) -> Plan:
    words = zip(plan.args, (*plan.args[1:], ""), strict=True)
    bind = ["--bind" if word == "--ro-bind" and after != "/dev/null" else word for word, after in words]
    return replace(plan, args=tuple(bind))


def _unmasked(plan: Plan, place: Place) -> Plan:
    return _dropped("--ro-bind", 2, first="/dev/null")(plan, place)


def _unveiled(plan: Plan, _: Place) -> Plan:
    real = dict(plan.veils)
    return replace(plan, args=tuple(real.get(word, word) for word in plan.args), veils=())


def _leaking(plan: Plan, _: Place) -> Plan:
    return replace(plan, files={**plan.files, "leak": b"HIVE_SECRET"})


def _talkative(plan: Plan, _: Place) -> Plan:
    return replace(plan, env={"HIVE_SECRET": "x"})


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

TIED_TO_KEEPER = Removal(_dropped("--die-with-parent"))
"""Nothing inside tries it: that no sandbox outlives its keeper shows when the keeper is killed."""

REMOVALS: Mapping[str, Removal] = {
    "own /tmp": Removal(_added(lambda _: ("--ro-bind", "/tmp", "/tmp"))),
    "own homes": Removal(_added(lambda place: ("--ro-bind", place.bait.home, "/root"))),
    "own /etc": Removal(_added(lambda _: ("--ro-bind", "/etc", "/etc"))),
    "empty files of installations": Removal(_dropped("--ro-bind-data", 2)),
    "veiled paths": Removal(_unveiled),
    "read-only system": Removal(_writable_system, root_only=_ROOTS_FILES),
    "read-only root": Removal(_dropped("--remount-ro", 1, first="/")),
    "read-only /dev": Removal(_dropped("--remount-ro", 1, first="/dev")),
    "read-only /proc": Removal(_dropped("--remount-ro", 1, first="/proc"), root_only=_ROOTS_FILES),
    "masked files of /proc": Removal(_unmasked),
    "no /sys": Removal(_added(lambda _: ("--ro-bind", "/sys", "/sys"))),
    "own /dev": Removal(
        # made read-only, a bind loses its devices
        _together(
            _replaced(("--dev", "/dev"), ("--dev-bind", "/dev", "/dev")), _dropped("--remount-ro", 1, first="/dev")
        ),
        root_only=_ROOTS_DEVICES,
    ),
    "user namespace": _shared("user", _dropped("--uid", 1), _dropped("--gid", 1), _dropped("--disable-userns")),
    "process namespace": _shared("pid", _dropped("--as-pid-1")),
    "network namespace": _shared("net"),
    "ipc namespace": _shared("ipc"),
    "uts namespace": _shared("uts", _dropped("--hostname", 1)),
    "control group namespace": _shared("cgroup"),
    "no nested user namespaces": Removal(_dropped("--disable-userns")),
    "no capabilities": Removal(_replaced(("--cap-drop", "ALL"), ("--cap-add", "ALL"))),
    "own first process": Removal(_dropped("--as-pid-1")),
    "closed first process": Removal(_init_readable),
    "clean environment": Removal(_talkative),
    "no other descriptors": Removal(_leaking),
    "sockets out of sight": Removal(_added(lambda place: ("--bind", place.run_dir, place.run_dir))),
    "own workspace": Removal(_added(_workspace)),
    "filter: terminals": _unfiltered(("ioctl",)),
    "filter: socket families": _unfiltered(("socket",)),
    "filter: other architectures": _cut(1, 3),
    "filter: x32": _cut(4, 6),
    **{protection: _unfiltered(tuple(calls)) for protection, calls in FILTERED.items()},
    "process limit": Removal(settings={"max_processes": 4000}),
    "open files limit": Removal(settings={"open_files": 2048}),
    "sizes of places": Removal(_dropped("--size", 1)),
    "processor limit": Removal(settings={"cpu": None}),
    "memory limit": Removal(settings={"memory_bytes": 2048 * MIB}),
    "bounded log": Removal(settings={"log_bytes": 1024 * MIB}),
    "bounded answers": Removal(patches={"ash_hub.runner_client.MAX_ANSWER_BYTES": 1 << 40}),
    "bounded values": Removal(patches={"ash_hub.runner_client.MAX_ANSWER_VALUES": 1 << 40}),
    "bounded pages": Removal(patches={"ash_hub.runner_client.MAX_LIST_PAGES": 1 << 40}),
    "one time for an answer": Removal(patches={"ash_hub.runner_client._within": _unbounded}),
    "egress policy": Removal(network=_named),
    "no proxy without a policy": Removal(network=lambda _: ("example.com",)),
}

INHERENT: Mapping[str, str] = {
    "no new privileges": "bubblewrap sets it for every sandbox and has no option to leave it out",
    "relative socket names": "the keeper binds in its own directory; no plan can make it do otherwise",
    "HTTP parser": "the hub's HTTP client reads no other protocol, and no head without an end",
    "requests to one endpoint": "a client of the hub has the sandbox's own socket and no other way to connect",
    "egress: one form of an address": "no policy can allow what the proxy's parser refuses",
}
"""Protections that no plan, setting, policy or name takes away."""

BACKED_UP: Mapping[str, str] = {
    "no nested user namespaces": "the filter's part for namespaces stops the same; both are taken away together",
    "bounded pages": "the time for an answer, which all pages share, stops the same; both are taken away together",
}
"""Protections behind others, so that nothing escapes by the loss of one of them alone."""


@dataclass(frozen=True)
class Weakened:
    """A launcher without some protections."""

    launcher: Launcher
    removals: Sequence[Removal]
    place: Place

    @property
    def warnings(self) -> Sequence[str]:
        return self.launcher.warnings

    def plan(self, spec: SandboxSpec, runtime: Runtime, limits: Limits) -> Plan:
        plan = self.launcher.plan(spec, runtime, limits)
        for removal in self.removals:
            plan = removal.change(plan, self.place)
        return plan
