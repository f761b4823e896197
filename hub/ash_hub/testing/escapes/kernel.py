"""Attempts on interfaces of the kernel that no sandbox needs.

A call counts as stopped where the filter answered, and as an escape where the kernel itself did, whatever it said:
the arguments are such that it would answer otherwise than the filter, and do nothing. Where the filter is
not Ash's own that cannot be told apart, so `Prison.bounds` names which errors count as refusals beside.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from ash_hub.backends.local._syscalls import ARCHITECTURES
from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["FILTERED", "KERNEL"]

_BOUND = "kernel"
_NONE = 99_999
"""No process, clock or command has this number."""

FILTERED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "filter: namespaces": {
        "unshare": (0,),
        "setns": (-1, 0),
        "clone": (0x10000200, 0, 0, 0, 0),
        "clone3": (0, 0),
    },
    "filter: mounts": {
        "mount": (0, 0, 0, 0, 0),
        "umount2": (0, 0),
        "chroot": (0,),
        "fsopen": (0, 0),
        "open_tree": (-1, 0, 0),
        "move_mount": (-1, 0, -1, 0, 0),
        "mount_setattr": (-1, 0, 0, 0, 0),
    },
    "filter: handles": {"open_by_handle_at": (0, 0, 0), "name_to_handle_at": (-1, 0, 0, 0, 0)},
    "filter: keys": {"keyctl": (0, -3, 0), "add_key": (0, 0, 0, 0, 0), "request_key": (0, 0, 0, 0)},
    "filter: bpf": {"bpf": (_NONE, 0, 0)},
    "filter: perf": {"perf_event_open": (0, 0, 0, 0, 0)},
    "filter: userfaultfd": {"userfaultfd": (1,)},
    "filter: fanotify": {"fanotify_init": (0x200, 0)},
    "filter: aio": {"io_setup": (0, 0)},
    "filter: io_uring": {"io_uring_setup": (1, 0), "io_uring_enter": (-1, 0, 0, 0, 0, 0)},
    "filter: other processes": {
        "ptrace": (16, _NONE, 0, 0),
        "process_vm_readv": (_NONE, 0, 0, 0, 0, 0),
        "process_vm_writev": (_NONE, 0, 0, 0, 0, 0),
        "process_madvise": (-1, 0, 0, 0, 0),
        "pidfd_getfd": (-1, 0, 0),
        "kcmp": (_NONE, _NONE, 0, 0, 0),
        "migrate_pages": (_NONE, 0, 0, 0),
        "move_pages": (_NONE, 0, 0, 0, 0, 0),
    },
    "filter: quotas": {"quotactl": (0xFF, 0, 0, 0)},
    "filter: clock": {"clock_settime": (_NONE, 0)},
    "filter: old interfaces": {"iopl": (_NONE,), "modify_ldt": (_NONE, 0, 0), "ustat": (0, 0), "sysfs": (_NONE,)},
}
"""Calls by the part of the filter that refuses them, each with arguments that the kernel would refuse otherwise."""

_ABSENT_CALLS = {
    *("clone3", "fsopen", "open_tree", "move_mount", "mount_setattr"),
    *("io_setup", "io_uring_setup", "io_uring_enter"),
}


def _numbers(name: str) -> dict[str, int]:
    return {machine: it.numbers[name] for machine, it in ARCHITECTURES.items() if name in it.numbers}


def _call(protection: str, name: str, arguments: tuple[int, ...]) -> Attempt:
    refused = errno.ENOSYS if name in _ABSENT_CALLS else errno.EPERM
    return Attempt(
        name=f"kernel: {name}",
        tries=f"reaches the kernel's {name}()",
        script=f"""
number = {_numbers(name)!r}.get(os.uname().machine)
absent("not on " + os.uname().machine) if number is None else None
result, error = system_call(number, *{arguments!r})
answer = errno.errorcode.get(error, error) if result < 0 else result
is_refused = (result, error) == (-1, {refused}) or answer in bound
stopped(answer) if is_refused else escaped(f"the kernel answered {{answer}}")""",
        stopped_by=(protection,),
        bound=_BOUND,
    )


def _socket(
    name: str, family: int, kind: int, protocol: int, refused: int, part: str = "filter: socket families"
) -> Attempt:
    return Attempt(
        name=f"kernel: {name} sockets",
        tries=f"opens a socket of {name}, which no network namespace confines or no sandbox needs",
        script=f"""
result, error = libc.socket({family}, {kind}, {protocol}), ctypes.get_errno()
answer = errno.errorcode.get(error, error) if result < 0 else result
is_refused = (result, error) == (-1, {refused}) or answer in bound
stopped(answer) if is_refused else escaped(f"the kernel answered {{answer}}")""",
        stopped_by=(part,),
        bound=_BOUND,
    )


def _protocol(name: str, kind: int, protocol: int) -> Attempt:
    return _socket(name, 2, kind, protocol, errno.EPROTONOSUPPORT, "filter: socket protocols")


def _control(name: str, tries: str, path: str, command: int, argument: int) -> Attempt:
    return Attempt(
        name=f"kernel: {name}",
        tries=tries,
        script=f"""
result, error = libc.fcntl(os.open({path!r}, os.O_RDONLY), {command}, {argument}), ctypes.get_errno()
answer = errno.errorcode.get(error, error) if result < 0 else result
is_refused = (result, error) == (-1, errno.EPERM) or answer in bound
stopped(answer) if is_refused else escaped(f"the kernel answered {{answer}}")""",
        stopped_by=("filter: file controls",),
        bound=_BOUND,
    )


_OTHERS = (
    Attempt(
        name="kernel: socket pairs",
        tries="makes a pair of sockets of other families than Unix's",
        script="""
pair = (ctypes.c_int * 2)()
result, error = libc.socketpair(40, 1, 0, pair), ctypes.get_errno()
answer = errno.errorcode.get(error, error) if result < 0 else result
stopped(answer) if (result, error) == (-1, errno.EAFNOSUPPORT) else escaped(f"the kernel answered {answer}")""",
        stopped_by=("filter: socket pairs",),
        bound=_BOUND,
    ),
    Attempt(
        name="kernel: core handler",
        tries="crashes with a limit on cores that starts the program which the host has for them",
        script="""
import resource
limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
stopped("1 byte, with which the kernel starts none") if limit == 1 else escaped(f"{limit} bytes")""",
        stopped_by=("core limit",),
        bound=_BOUND,
    ),
    Attempt(
        name="kernel: core limit",
        tries="lowers its limit on cores to one that does not keep the host's program for them from starting",
        script="""
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))  # wants the old one, too
except PermissionError:
    pass
left, _ = resource.getrlimit(resource.RLIMIT_CORE)
stopped("it is told so, and 1 byte stays") if left == 1 else escaped(f"{left} bytes")""",
        stopped_by=("filter: core limit",),
        bound=_BOUND,
    ),
    Attempt(
        name="kernel: new namespaces",
        tries="makes a user namespace, in which it has every capability",
        script="""
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
result, error = system_call(number, 0x10000000)
escaped("it has one") if result == 0 else stopped(errno.errorcode[error])""",
        stopped_by=("filter: namespaces", "no nested user namespaces"),
        bound=_BOUND,
    ),
    Attempt(
        name="kernel: TIOCSTI",
        tries="types into its terminal, which could be the one that the hive was started from",
        script="""
import fcntl, pty, termios
main, terminal = pty.openpty()
if os.fork() == 0:
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    try: fcntl.ioctl(terminal, termios.TIOCSTI, b"x")
    except OSError as error: stopped(reason(error)) if error.errno == errno.EPERM else escaped(reason(error))
    escaped("a letter was typed")
os.wait()
os._exit(0)""",
        stopped_by=("filter: terminals",),
        bound=_BOUND,
    ),
    Attempt(
        name="kernel: calls of i386",
        tries="calls the kernel as a 32-bit program, past a filter that knows 64-bit numbers",
        script="""
import mmap
absent("only x86_64 has them") if os.uname().machine != "x86_64" else None
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # getpid of i386, by int 0x80
result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
escaped(f"it got {result}") if result > 0 else stopped(errno.errorcode[-result])""",
        stopped_by=("filter: other architectures",),
        bound=_BOUND,
    ),
    Attempt(
        name="kernel: calls of x32",
        tries="calls the kernel by x32 numbers, past a filter that knows 64-bit ones",
        script="""
absent("only x86_64 has them") if os.uname().machine != "x86_64" else None
result, error = system_call(0x40000000 + 39)
escaped(f"it got {result}") if result > 0 else stopped(errno.errorcode[error])""",
        stopped_by=("filter: x32",),
        bound=_BOUND,
    ),
)

KERNEL = (
    *(_call(protection, *entry) for protection, calls in FILTERED.items() for entry in calls.items()),
    _socket("AF_PACKET", 17, 3, 0, errno.EAFNOSUPPORT),
    _socket("AF_VSOCK", 40, 1, 0, errno.EAFNOSUPPORT),
    _socket("AF_ALG", 38, 5, 0, errno.EAFNOSUPPORT),
    _socket("NETLINK_AUDIT", 16, 3, 9, errno.EPROTONOSUPPORT),
    _protocol("MPTCP", 1, 262),
    _protocol("UDP-Lite", 2, 136),
    _protocol("SCTP", 1, 132),
    _protocol("ICMP", 2, 1),
    _protocol("DCCP", 6, 0),
    _control("leases", "takes a lease on a file that it shares with others", "/usr/bin/env", 1024, 0),
    _control("notices", "asks for signals about a directory that it shares with others", "/usr", 1026, 1),
    *_OTHERS,
)
