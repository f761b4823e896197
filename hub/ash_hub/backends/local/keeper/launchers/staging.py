"""The stage of a machine: mounts that a launch with a range of users makes before bubblewrap starts.

The sandbox's root does not own the host's files, and may not pass through the keeper's directory. So everything that
it is to see is mounted on a stage first, as the host's root: directories of the host by mounts that show their owners
as the sandbox's own (idmapped), writable ones below overlays whose upper layers share one bounded tmpfs. Then the
process enters the sandbox's user namespace, is root there, and bubblewrap binds what is on the stage.

With `layers` (`layers.py`) the upper layers are on file systems of the keeper's, whose owners are numbers from 0 on:
an idmapped mount shows each as the sandbox's own, so that another sandbox can stand on it with other users. What
earlier ones wrote lies between the host's directory and the upper layer, read-only.

Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import stat
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .layers import OPTIONS, Spaces, acting_as, attach, key_of, new_space, prepared
from .mount_names import checked, hides_mounts, mount, mount_points, own_mounts

if TYPE_CHECKING:
    from .plan import Plan

__all__ = [
    "CAPABILITY_NUMBERS",
    "Place",
    "Staged",
    "drop_groups",
    "enter",
    "make_namespace",
    "make_places",
    "place",
    "places_of",
    "set_up",
    "staged",
    "tmpfs",
    "try_out",
    "user_namespace",
]

_NEW_USER = 0x10000000
_READ_ONLY, _BIND, _RECURSIVE = 0x1, 0x1000, 0x4000
_NO_SUID, _NO_DEVICES = 0x2, 0x4
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
"""The same on every architecture that the system call filter knows."""
_AT_FDCWD, _EMPTY_PATH, _CLONE, _CLOSE = -100, 0x1000, 1, os.O_CLOEXEC
_FROM_EMPTY_PATH = 0x4
_IDMAP = 0x00100000
_PARENT_DEATH_SIGNAL, _DUMPABLE = 1, 4
_CAPABILITY_VERSION, _BOUNDING_SET_DROP = 0x20080522, 24
CAPABILITY_NUMBERS = {
    **{"CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6},
    **{"SETUID": 7, "SETPCAP": 8, "NET_BIND_SERVICE": 10, "SYS_CHROOT": 18},
}
"""The numbers of those that a plan may name."""
_PLACES = ("/mnt", "/media", "/srv", "/tmp")
_NO_NAMESPACES = "/proc/sys/user/max_user_namespaces"


class Staged(NamedTuple):
    """A thing on the stage."""

    source: str
    """On the host."""
    name: str
    """On the stage."""
    kind: str
    """`bind`, `overlay` (read-only, with inodes of its own), `writable` or `kept`."""
    target: str = ""
    """Inside, of what is written to."""
    mode: str | None = None
    """Of what is `kept`, as in a plan."""
    below: Sequence[str] = ()
    """On the host, as in a plan."""

    @property
    def space(self) -> str:
        """The file system of a layer that it is written to."""
        return self.target if self.kind == "kept" else "/"


class Place(NamedTuple):
    """Something that is mounted on, or written to, below a directory that the sandbox may have changed before."""

    base: str
    """On the stage."""
    path: str
    """Below it, without a slash at the beginning."""
    is_directory: bool


def make_places(places: Sequence[Place]) -> None:
    """Make places, as the root of the sandbox, where they are missing; nothing leads away from where they are to be.

    What the sandbox put there in an earlier life would lead whoever mounts to files of the host, as a link does.

    Raises:
        OSError: Something that is no directory is in the way; the message names it.
    """
    for it in places:
        *above, last = it.path.split("/")
        at = os.open(it.base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in (*above, last) if it.is_directory else above:
            at = _step(at, name, it.path)
        try:
            if not it.is_directory and _is_no_file(last, at):
                os.unlink(last, dir_fd=at)
        except OSError as error:
            raise OSError(error.errno, f"/{it.path} is a directory, and the hive has a file there") from error
        finally:
            os.close(at)


def _step(directory: int, name: str, path: str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            return os.open(name, flags, dir_fd=directory)
        except FileNotFoundError:
            os.mkdir(name, 0o755, dir_fd=directory)
            return os.open(name, flags, dir_fd=directory)
        except OSError as error:
            why = f"{name!r} of /{path} is no directory any more, and the hive mounts there"
            raise OSError(error.errno, why) from error
    finally:
        os.close(directory)


def _is_no_file(name: str, directory: int) -> bool:
    try:
        return not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def staged(plan: Plan) -> list[Staged]:
    """Return what a launch with users of its own puts on its stage: all that it shows of the host."""
    found: list[Staged] = []
    for number, it in enumerate(plan.mounts):
        is_kept = it.kind == "kept" and plan.layers
        is_shown = it.kind in ("bind", "writable") and not (it.optional and not os.path.exists(it.source))
        if is_kept or is_shown:
            shown = "overlay" if it.overlay is not None else it.kind
            found.append(Staged(it.source, str(number), shown, it.target, it.mode, it.below))
    return found


def places_of(plan: Plan) -> list[Place]:
    """Return where something is mounted or written below what a sandbox may have changed in an earlier life."""
    found: list[Place] = []
    for number, it in enumerate(plan.mounts):
        if it.kind == "read_only" or it.target == "/":
            continue
        above = [
            (base, other)
            for base, other in enumerate(plan.mounts[:number])
            if other.kind != "pinned" and it.target.startswith(other.target.rstrip("/") + "/")
        ]
        base, under = max(above, key=lambda pair: (len(pair[1].target), pair[0]))
        if under.kind == "writable":
            path = it.target.removeprefix(under.target).lstrip("/")
            is_file = it.kind == "file" or (it.kind == "bind" and not os.path.isdir(it.source))
            found.append(Place(f"{place()}/{base}", path, not is_file))
    return found


def place() -> str:
    """Return the directory that a launch covers with its stage, in a mount namespace that nobody else has."""
    return next(path for path in _PLACES if os.path.isdir(path) and not os.path.islink(path))


def user_namespace(first: int, count: int, owner: int | None = None, *, runs: str = "", processes: int = 0) -> int:
    """Return a descriptor of a new user namespace that maps 0 and those that follow to the host's `first` and on.

    Args:
        owner: Who may enter it. None: `first` too, so that what the kernel counts for owners of namespaces is the
            sandbox's own.
        runs: A map of other numbers, in the kernel's format.
        processes: A limit on those of all its users together; 0 is none.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mapped = runs or f"0 {first} {count}\n"

    def become() -> None:
        drop_groups()
        user = first if owner is None else owner
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        if processes:
            resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        checked(libc.unshare(_NEW_USER))
        checked(libc.prctl(_DUMPABLE, 1, 0, 0, 0))  # else its maps are for the host's root alone

    def give_users(helper: int) -> None:
        for name in ("uid_map", "gid_map"):
            descriptor = os.open(f"/proc/{helper}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, mapped.encode())
            finally:
                os.close(descriptor)

    return make_namespace(become, give_users)


def make_namespace(become: Callable[[], object], give_users: Callable[[int], None]) -> int:
    """Return a descriptor of a new user namespace, made by a child that ends before this returns.

    Args:
        become: Enters the namespace; called in the child.
        give_users: Writes the child's maps; called in this process, with the child's number.

    Raises:
        PermissionError: The child could not enter it. What `give_users` raises is passed on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    told, tell = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    if (helper := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            become()
            checked(libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
            if os.getppid() == parent:  # else it has died before that could be told
                os.write(tell, b"+")
                signal.pause()
        os._exit(1)
    try:
        os.close(tell)
        if os.read(told, 1) != b"+":
            raise PermissionError(errno.EPERM, "no user namespace can be made for its users")
        give_users(helper)
        return os.open(f"/proc/{helper}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(told)
        os.kill(helper, signal.SIGKILL)
        os.waitpid(helper, 0)


def drop_groups() -> None:
    """Leave all supplementary groups; a user without subordinates keeps them, as the kernel wants it."""
    with open("/proc/self/setgroups") as file:
        if file.read() != "deny\n":
            os.setgroups([])


def set_up(
    stage: str,
    things: Sequence[Staged],
    users: int | None,
    owner: int,
    size: int | None,
    layers: Sequence[Spaces] = (),
) -> bool:
    """Mount things on a stage, in a process that has its own mounts.

    Args:
        stage: A directory of the host, which the stage covers.
        users: The descriptor of the sandbox's user namespace. None: what is shown keeps its owners.
        owner: The host's number of the sandbox's root.
        size: In bytes, of the space that the writable ones share; None is as much as memory allows.
        layers: Where what is written goes, and what it stands on: `Plan.layers`. None: to a space of this launch.

    Returns:
        Whether every overlay could be mounted; the others show their directories with the host's inodes and paths.

    Raises:
        OSError: The kernel does not let this user do it.
    """
    opened = [os.open(thing.source or "/", os.O_PATH | os.O_CLOEXEC) for thing in things]
    opened_below = [[os.open(path, os.O_PATH | os.O_CLOEXEC) for path in thing.below] for thing in things]
    mounted = mount_points()
    tmpfs(stage, "mode=0711")
    for number, name in enumerate(("empty", "lower", "upper")):
        os.mkdir(f"{stage}/{name}", 0o711 if number else 0o755)
    if layers:
        _attach_all(stage, layers, users)
    else:
        bound = "" if size is None else f",size={size}"
        tmpfs(f"{stage}/upper", f"mode=0700{bound}")
    is_whole = True
    for number, (thing, source) in enumerate(zip(things, opened, strict=True)):
        target = f"{stage}/{thing.name}"
        if not os.path.isdir(f"/proc/self/fd/{source}"):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            mount(f"/proc/self/fd/{source}", target, _BIND)
        elif thing.kind == "bind":
            os.mkdir(target, 0o755)
            mount(f"/proc/self/fd/{source}", target, _BIND | _RECURSIVE)
        else:
            os.mkdir(target, 0o755)
            if thing.kind == "kept":
                _kept(stage, thing, layers, owner)
                os.close(source)
                continue
            lower = f"{stage}/lower/{number}"
            os.mkdir(lower)
            if users is None:
                mount(f"/proc/self/fd/{source}", lower, _BIND | _RECURSIVE)
            else:
                _show(source, lower, users, is_written=thing.kind == "writable")
            lowers = [lower, *_shown_below(opened_below[number], lower, users)]
            if thing.kind == "writable" and layers:
                _stacked(stage, thing, layers, owner, lowers)
            elif thing.kind == "writable":
                _writable(lowers, target, f"{stage}/upper/{number}", owner, "" if users is not None else ",userxattr")
            elif hides_mounts(thing.source, mounted) or not _overlay(lower, target, f"{stage}/empty"):
                mount(lower, target, _BIND | (_RECURSIVE if users is None else 0))
                is_whole = False
        os.close(source)
    return is_whole


def _shown_below(sources: Sequence[int], name: str, users: int | None) -> list[str]:
    """Mount further directories beside the first, and return where."""
    shown: list[str] = []
    for number, source in enumerate(sources):
        assert users is not None, "images have owners of their own"
        os.mkdir(target := f"{name}.{number}")
        _show_as_own(source, target, users)
        os.close(source)
        shown.append(target)
    return shown


def _show(source: int, target: str, users: int, *, is_written: bool) -> None:
    try:
        _show_as_own(source, target, users)
    except OSError:
        if is_written:
            raise
        mount(f"/proc/self/fd/{source}", target, _BIND)  # NFS, FUSE: its files are nobody's


def enter(users: int, bounding: Sequence[str]) -> None:
    """Become the root of a user namespace in which nobody can make another.

    Args:
        bounding: The capabilities that programs it executes may have, but for the next one, which has all.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    checked(libc.setns(users, _NEW_USER))
    os.close(users)
    drop_groups()
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    descriptor = os.open(_NO_NAMESPACES, os.O_WRONLY | os.O_CLOEXEC)
    os.write(descriptor, b"0\n")
    os.close(descriptor)
    last = _last_capability()
    every = (1 << last + 1) - 1
    low, high = every & 0xFFFF_FFFF, every >> 32
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    checked(libc.capset(header, struct.pack("=6I", low, low, low, high, high, high)))
    for number in set(range(last + 1)) - {CAPABILITY_NUMBERS[name] for name in bounding}:
        checked(libc.prctl(_BOUNDING_SET_DROP, number, 0, 0, 0))


def _last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def tmpfs(target: str, options: str) -> None:
    """Mount an empty place to write to, without device nodes."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_NO_SUID | _NO_DEVICES)
    checked(libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", flags, options.encode()))


def _show_as_own(source: int, target: str, users: int) -> None:
    """Mount a directory so that its files belong inside to whom they belong outside."""
    libc = ctypes.CDLL(None, use_errno=True)
    tree = checked(libc.syscall(_OPEN_TREE, source, b"", _CLONE | _CLOSE | _EMPTY_PATH))
    try:
        wanted = struct.pack("=QQQQ", _IDMAP, 0, 0, users)
        checked(libc.syscall(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, wanted, len(wanted)))
        checked(libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _FROM_EMPTY_PATH))
    finally:
        os.close(tree)


def _attach_all(stage: str, layers: Sequence[Spaces], users: int | None) -> None:
    for number, layer in enumerate(layers):
        for space, descriptor in layer.items():
            shown = _shown(stage, number, space)
            os.mkdir(shown, 0o711)
            attach(descriptor, shown, users, read_only=number < len(layers) - 1)


def _shown(stage: str, number: int, space: str) -> str:
    """Return where a space of a layer is on the stage."""
    return f"{stage}/upper/{number}{key_of(space)}"


def _kept(stage: str, thing: Staged, layers: Sequence[Spaces], owner: int) -> None:
    """Show a place that has nothing of the host below; without an overlay, where no layer has anything of it."""
    below = prepared(layers, thing.space, thing.target, None, int(thing.mode or "0755", 8))
    if below:
        _mount_stack(stage, thing, layers, owner, below, ())
    else:
        upper = f"{_shown(stage, len(layers) - 1, thing.space)}/{key_of(thing.target)}/upper"
        mount(upper, f"{stage}/{thing.name}", _BIND)


def _stacked(stage: str, thing: Staged, layers: Sequence[Spaces], owner: int, lowers: Sequence[str]) -> None:
    like = os.open(lowers[0], os.O_PATH | os.O_CLOEXEC)
    below = prepared(layers, thing.space, thing.target, like, 0o755)
    os.close(like)
    _mount_stack(stage, thing, layers, owner, below, lowers)


def _mount_stack(
    stage: str, thing: Staged, layers: Sequence[Spaces], owner: int, below: Sequence[int], lowest: Sequence[str]
) -> None:
    key = key_of(thing.target)
    lowers = [f"{_shown(stage, number, thing.space)}/{key}/upper" for number in reversed(below)]
    top = f"{_shown(stage, len(layers) - 1, thing.space)}/{key}"
    with acting_as(owner):
        _mount_overlay(f"{stage}/{thing.name}", [*lowers, *lowest], top)


def _mount_overlay(target: str, lowers: Sequence[str], top: str) -> None:
    """Mount a writable overlay; `top` has the directories `upper` and `work`, and the first of `lowers` is highest."""
    held = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (*lowers, f"{top}/upper", f"{top}/work")]
    *lower, upper, work = (f"/proc/self/fd/{number}" for number in held)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work},{OPTIONS}"
    checked(libc.mount(b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(0), options.encode()))
    for number in held:
        os.close(number)


def _writable(lowers: Sequence[str], target: str, upper: str, owner: int, more: str) -> None:
    status = os.stat(lowers[0])
    for path in (upper, f"{upper}/upper", f"{upper}/work"):
        os.mkdir(path, 0o755)
        os.chown(path, owner, owner)
    os.chmod(f"{upper}/upper", status.st_mode & 0o7777)
    held = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (*lowers, f"{upper}/upper", f"{upper}/work")]
    *below, over, work = (f"/proc/self/fd/{number}" for number in held)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"lowerdir={':'.join(below)},upperdir={over},workdir={work},volatile,xino=off{more}"
    checked(libc.mount(b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(0), options.encode()))
    for number in held:
        os.close(number)


def _overlay(lower: str, target: str, empty: str) -> bool:
    held = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (lower, empty)]
    libc = ctypes.CDLL(None, use_errno=True)
    options = "lowerdir=" + ":".join(f"/proc/self/fd/{number}" for number in held)
    done = libc.mount(b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(_READ_ONLY), options.encode())
    for number in held:
        os.close(number)
    return done == 0


def try_out(directories: Sequence[str], first: int, count: int, *, layered: bool = False) -> str:
    """Mount directories as writable ones and write to them; return `ok`, or why that is refused.

    Args:
        layered: Whether on layers of the keeper's.

    It is done in a child, so to be called where no thread runs. Nothing of it is left.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            _write_to(directories, first, count, layered=layered)
            os.write(writing, b"ok")
        except Exception as error:
            os.write(writing, str(error).encode() or b"it failed")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as answer:
        return answer.read().decode()


def _write_to(directories: Sequence[str], first: int, count: int, *, layered: bool) -> None:
    own_mounts()
    users = user_namespace(first, count)
    things = [Staged(path, str(number), "writable", path) for number, path in enumerate(directories)]
    stage = place()
    layers = [{"/": new_space(1 << 20)} for _ in range(2)] if layered else ()
    set_up(stage, things, users, first, 1 << 20, layers)
    enter(users, ())
    for thing in things:
        made = f"{stage}/{thing.name}/ash-trial"
        os.mkdir(made)
        os.rmdir(made)
