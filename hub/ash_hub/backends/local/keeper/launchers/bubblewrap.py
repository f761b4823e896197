"""The launcher that isolates with bubblewrap: a root of its own, new namespaces, few capabilities, a filter."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping

from .launcher import LaunchError
from .mount_names import DEVICES, own_mounts, seal, show
from .plan import Identity, Mount, Plan
from .process import INIT, ProcessHandle, start
from .staging import enter, make_places, place, places_of, set_up, staged, user_namespace
from .subordinate import OuterNamespace, take_root

__all__ = ["SHARED", "BubblewrapLauncher", "mount_names", "options_for"]

_INIT_PATH = "/opt/ash/init.py"
_NAMES = "v"
"""The directory below the keeper's own where overlays are mounted, for each launch in a mount namespace of its own."""
_EMPTY = "v/empty"
SHARED = (
    "a directory of the host is shared as it is, for something is mounted below it or its file system takes no "
    "overlay: this sandbox can watch who opens its files, lock them, and read where it lies"
)
_STATUS_BYTES = 65_536


class BubblewrapLauncher:
    """Starts every sandbox in namespaces of its own.

    Args:
        program: Path of bubblewrap.
        options: The options that this version of it knows, such as `--size`; others are left out.
    """

    def __init__(self, program: str, options: frozenset[str]) -> None:
        self._program = program
        self._options = options

    def launch(self, plan: Plan) -> ProcessHandle:
        names = mount_names(plan)
        init = (*plan.loader, plan.python, "-I", "-S", _INIT_PATH, "@fd:up@", "@fd:life@", str(plan.processes), "ns")
        shared = os.memfd_create("shared", os.MFD_CLOEXEC)
        try:
            handle = start(
                (self._program, "--args", "@fd:args@", "--", *init, *plan.command),
                plan,
                files=_files(plan),
                arguments=tuple(options_for(plan, names, self._options)),
                prepare=_preparation(plan, names, shared),
                first_process=_first_process,
            )
            handle.warnings = [SHARED] if os.fstat(shared).st_size else []
        except LaunchError as error:
            if why := os.pread(shared, _STATUS_BYTES, 1).decode(errors="replace"):
                raise LaunchError(error.step, why) from error
            raise
        finally:
            os.close(shared)
        return handle


def mount_names(plan: Plan) -> dict[str, str]:
    """Return where the overlay of each directory of the host appears, for the launch alone."""
    directories = sorted({mount.overlay for mount in plan.mounts if mount.overlay is not None})
    return {path: os.path.abspath(os.path.join(_NAMES, str(number))) for number, path in enumerate(directories)}


def options_for(plan: Plan, names: Mapping[str, str], known: frozenset[str]) -> Iterator[str]:
    """Yield bubblewrap's options for a plan; nothing is started."""
    identity = plan.identity
    if identity.users:  # bubblewrap is started as their root
        yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup")
    else:
        yield from ("--unshare-all", "--unshare-user", "--uid", str(identity.uid), "--gid", str(identity.gid))
    # Not --die-with-parent: a bubblewrap that is killed before it has let its child go on leaves that child for ever.
    yield from ("--hostname", identity.host_name, "--new-session", "--as-pid-1")
    yield from ("--cap-drop", "ALL", "--json-status-fd", "@fd:status@")
    for name in plan.capabilities if identity.users else ():
        yield from ("--cap-add", f"CAP_{name}")
    if "--disable-userns" in known and not identity.users:
        yield "--disable-userns"
    if plan.hold is not None:
        yield from ("--setenv", "ASH_HOLD_FD", "@fd:hold@")
    if plan.system_call_filter is not None:
        yield from ("--seccomp", "@fd:seccomp@")
    init = ("--perms", "0644", "--file", "@fd:init@", _INIT_PATH)
    runtime = os.path.dirname(_INIT_PATH)
    place_of_its_own = next((number for number, it in enumerate(plan.mounts) if it.target == runtime), -1)
    if place_of_its_own < 0:
        yield from init
    for number, mount in enumerate(plan.mounts):
        stage = _on_stage(plan, number) if identity.users else None
        if mount.kind == "kept" and not plan.layers:
            mount = mount._replace(kind="tmpfs")
        yield from _mount(mount, f"@fd:mount.{number}@", names, known, stage)
        if number == place_of_its_own:
            yield from init
    for key, value in plan.environment.items():
        yield from ("--setenv", key, value)
    yield from ("--chdir", plan.directory)


def _on_stage(plan: Plan, number: int) -> str:
    """Return where a mount of the plan, or the directory that is pinned, is on the stage."""
    mount = plan.mounts[number]
    if mount.kind != "pinned":
        return f"{place()}/{number}"
    return f"{_root(plan)}{mount.target}"


def _root(plan: Plan) -> str:
    """Return where the root file system that is written to is on the stage."""
    root = next(n for n, it in enumerate(plan.mounts) if (it.kind, it.target) == ("writable", "/"))
    return f"{place()}/{root}"


def _mount(
    mount: Mount, content: str, names: Mapping[str, str], known: frozenset[str], stage: str | None
) -> Iterator[str]:
    if mount.size is not None and mount.kind == "tmpfs" and "--size" in known:
        yield from ("--size", str(mount.size))
    if mount.mode is not None and mount.kind != "kept":
        yield from ("--perms", mount.mode)
    match mount.kind:
        case "bind":
            source = mount.source
            if stage is not None:
                source = stage
            elif mount.overlay is not None:
                source = names[mount.overlay] + source.removeprefix(mount.overlay)
            yield from ("--ro-bind-try" if mount.optional else "--ro-bind", source, mount.target)
        case "folder":
            assert stage is None, "users of a sandbox's own cannot write to a folder of the host"
            yield from ("--bind", mount.source, mount.target)
        case "writable" | "kept" | "pinned":
            assert stage is not None, "only a sandbox with users of its own has a root to write to"
            yield from ("--bind", stage, mount.target)
        case "file":
            yield from ("--file", content, mount.target)
        case "covered":
            yield from ("--ro-bind-data", content, mount.target)
        case "masked":
            yield from ("--ro-bind", "/dev/null", mount.target)
        case "link":
            yield from ("--symlink", mount.source, mount.target)
        case _:
            yield from (_PLAIN[mount.kind], mount.target)


_PLAIN = {"tmpfs": "--tmpfs", "directory": "--dir", "proc": "--proc", "devices": "--dev", "read_only": "--remount-ro"}


def _files(plan: Plan) -> dict[str, bytes]:
    files = {f"mount.{n}": it.content for n, it in enumerate(plan.mounts) if it.kind in ("file", "covered")}
    files["init"] = INIT.read_bytes()
    if plan.system_call_filter is not None:
        files["seccomp"] = plan.system_call_filter
    return files


def _preparation(plan: Plan, names: Mapping[str, str], shared: int) -> Callable[[], None]:
    """Return what the child mounts before it becomes bubblewrap; it writes to `shared` if an overlay is refused."""
    if plan.identity.users:
        return _staging(plan, shared)
    for name in names.values():
        os.makedirs(name, mode=0o700, exist_ok=True)
    if names:
        os.makedirs(_EMPTY, mode=0o700, exist_ok=True)
    empty = os.path.abspath(_EMPTY)
    seals = any(mount.sealed for mount in plan.mounts)

    def prepare() -> None:
        if names or seals:
            own_mounts()
        if names and not show([(name, path) for path, name in names.items()], empty):
            os.write(shared, b"1")
        if seals:
            seal(DEVICES)
            # Through the keeper's own descriptor, a sandbox could still change the node that it is of.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    return prepare


def _staging(plan: Plan, shared: int) -> Callable[[], None]:
    """Return what the child of a plan with users of its own does before it becomes bubblewrap, as their root."""
    things, stage, identity = staged(plan), place(), plan.identity
    places = places_of(plan)
    seals = any(mount.sealed for mount in plan.mounts)
    of_user = None if plan.subordinate is None else OuterNamespace.of(plan.subordinate)

    def prepare() -> None:
        if of_user is None:
            first, runs, processes = _first_user(identity), "", 0
        else:
            first, runs = of_user.enter(identity.first_user)
            processes = plan.processes
        own_mounts()
        users = user_namespace(first, identity.users, runs=runs, processes=processes)
        shown_as = users if of_user is None else None
        if not set_up(stage, things, shown_as, first, plan.writable_bytes, plan.layers):
            os.write(shared, b"1")
        if seals:
            seal(DEVICES)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        enter(users, plan.capabilities)
        try:
            make_places(places)
        except OSError as error:
            os.pwrite(shared, f" {error.strerror}".encode(), 0)
            raise
        if plan.subordinate is not None:
            take_root(_root(plan), plan.subordinate)

    return prepare


def _first_user(identity: Identity) -> int:
    assert identity.first_user is not None, "the keeper says which users they are"
    return identity.first_user


def _first_process(status: int) -> int | None:
    """Return a descriptor of the sandbox's first process, if bubblewrap named it."""
    with contextlib.suppress(ValueError, KeyError, ProcessLookupError):
        first = os.pread(status, _STATUS_BYTES, 0).decode().splitlines() or ["{}"]
        return os.pidfd_open(json.loads(first[0])["child-pid"])
    return None
