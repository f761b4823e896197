"""The system call filter of a sandbox: a classic BPF program that refuses what no sandbox needs.

Everything else is allowed: the filter narrows the kernel's surface and closes ways around the namespaces, while
capabilities and namespaces do the rest. System calls of another architecture, and the x32 ones, do not exist in it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping

from ash_hub.backends.local._syscalls import ARCHITECTURES, Architecture

__all__ = ["build", "for_machine"]

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000

_NEW_NAMESPACES = 0x7E020000
"""Every `CLONE_NEW*` that `clone` takes."""
_TERMINAL_INJECTIONS = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX, which type into the terminal that the hive was started from."""
_FOREIGN_TRACING = (16, 0x4206)
"""PTRACE_ATTACH and PTRACE_SEIZE; a debugger may still trace the program that it starts."""
_UNIX, _IPV4, _IPV6, _NETLINK = 1, 2, 10, 16
_NETLINK_ROUTE = 0
_ODD_KINDS = 0xC
"""Bits of every type of socket but stream, datagram and raw; others have protocols of their own as a default."""
_PROTOCOLS = (0, 6, 17)
"""The default, TCP, UDP. The kernel loads modules for others; for ICMP it lets nobody in a network namespace."""
_FILE_CONTROLS = (1024, 1026, 1040)
"""F_SETLEASE, F_NOTIFY and F_SETDELEG, which tell what others do with a file or hold them up."""
_CORE = 4

_REFUSED = (
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "swapon", "swapoff", "reboot", "acct"),
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "create_module"),
    *("quotactl", "quotactl_fd", "name_to_handle_at", "open_by_handle_at", "lookup_dcookie", "nfsservctl"),
    *("keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd", "fanotify_init"),
    *("process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp", "syslog", "vhangup"),
    *("sethostname", "setdomainname", "settimeofday", "clock_settime", "migrate_pages", "move_pages"),
    *("iopl", "ioperm", "modify_ldt", "uselib", "ustat", "sysfs", "_sysctl", "vserver"),
)
_ABSENT = (
    *("clone3", "io_setup", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "open_tree_attr"),
)
"""Answered as if the kernel did not have them, so that programs fall back. `clone3` has its flags in memory, where
a filter cannot see them; the C library then takes `clone`. `io_setup` takes from a number that the whole host has."""


_NESTING = frozenset(("setns", "unshare", "mount", "umount2", "move_mount", "open_tree", "mount_setattr"))
"""Calls with which what a process forks enters the walls that were made for it, and mounts its `/proc` there."""


def for_machine(machine: str, *, nests: bool = False) -> bytes | None:
    """Return the program for a machine, as `os.uname` names it; None if the filter has no numbers for it.

    Args:
        nests: Whether it is for a process that makes sandboxes, each of which gets the other one on top.
    """
    architecture = ARCHITECTURES.get(machine)
    return None if architecture is None else build(architecture, allowed=_NESTING if nests else frozenset())


def build(architecture: Architecture, allowed: frozenset[str] = frozenset()) -> bytes:
    """Return the program as an array of `struct sock_filter`."""
    numbers = architecture.numbers
    code = [_instruction(_LOAD, _ARCHITECTURE), _instruction(_EQUAL, architecture.audit, 1, 0)]
    code += [_refuse(errno.ENOSYS), _instruction(_LOAD, _NUMBER)]
    code += [_instruction(_AT_LEAST, _X32_BIT, 0, 1), _refuse(errno.ENOSYS)]
    for names, code_of_error in ((_REFUSED, errno.EPERM), (_ABSENT, errno.ENOSYS)):
        for name in names:
            if name in numbers and name not in allowed:
                code += [_instruction(_EQUAL, numbers[name], 0, 1), _refuse(code_of_error)]
    for name, block in _conditional(numbers).items():
        code += [_instruction(_EQUAL, numbers[name], 0, len(block)), *block]
    return b"".join([*code, _instruction(_RETURN, _ALLOW)])


def _conditional(numbers: Mapping[str, int]) -> dict[str, list[bytes]]:
    """Return, for calls that depend on an argument, a block that always returns."""
    allow = _instruction(_RETURN, _ALLOW)
    clone = [_argument(0), _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1), _refuse(errno.EPERM), allow]
    blocks = {"clone": clone, "ioctl": [_argument(1)], "ptrace": [_argument(0)], "fcntl": [_argument(1)]}
    refused = {"ioctl": _TERMINAL_INJECTIONS, "ptrace": _FOREIGN_TRACING, "fcntl": _FILE_CONTROLS}
    for name, values in refused.items():
        for value in values:
            blocks[name] += [_instruction(_EQUAL, value, 0, 1), _refuse(errno.EPERM)]
        blocks[name].append(allow)
    blocks["socket"] = _socket()
    blocks["socketpair"] = [_argument(0), _instruction(_EQUAL, _UNIX, 0, 1), allow, _refuse(errno.EAFNOSUPPORT)]
    blocks["setrlimit"] = [_argument(0), _instruction(_EQUAL, _CORE, 1, 0), allow, _pretend()]
    blocks["prlimit64"] = _limits()
    return {name: block for name, block in blocks.items() if name in numbers}


def _socket() -> list[bytes]:
    """Allow Unix, TCP, UDP and routing sockets. Other families, such as vsock, no network namespace confines."""
    allow, refuse = _instruction(_RETURN, _ALLOW), _refuse(errno.EPROTONOSUPPORT)
    of_internet = [_argument(1), _instruction(_ANY_BIT, _ODD_KINDS, 0, 1), refuse, _argument(2)]
    for protocol in _PROTOCOLS:
        of_internet += [_instruction(_EQUAL, protocol, 0, 1), allow]
    of_internet.append(refuse)
    of_netlink = [_argument(2), _instruction(_EQUAL, _NETLINK_ROUTE, 0, 1), allow, refuse]
    code = [_argument(0), _instruction(_EQUAL, _UNIX, 0, 1), allow, _instruction(_EQUAL, _IPV4, 1, 0)]
    code += [_instruction(_EQUAL, _IPV6, 0, len(of_internet)), *of_internet]
    code += [_instruction(_EQUAL, _NETLINK, 0, len(of_netlink)), *of_netlink]
    return [*code, _refuse(errno.EAFNOSUPPORT)]


def _limits() -> list[bytes]:
    """Let `prlimit64` set every limit but that on cores, and tell of all; whoever sets that one is told that it did.

    With another limit than 1 byte, a crash starts the program that the host may have for cores, as root and outside.
    Programs that hold secrets want 0 and give up where they cannot have it. Whoever wants the old limit at once is
    refused: a filter cannot fill it in.
    """
    allow = _instruction(_RETURN, _ALLOW)
    code = [_argument(1), _instruction(_EQUAL, _CORE, 1, 0), allow]
    sets = [*_unless_null(3, _refuse(errno.EPERM)), _pretend()]
    return [*code, *_unless_null(2, *sets), allow]


def _unless_null(index: int, *then: bytes) -> list[bytes]:
    """Run `then`, which returns, where an argument is a pointer: where either half of it is not 0."""
    low, high = (_instruction(_LOAD, _ARGUMENTS + 8 * index + offset) for offset in (0, 4))
    return [low, _instruction(_EQUAL, 0, 0, 2), high, _instruction(_EQUAL, 0, len(then), 0), *then]


def _argument(index: int) -> bytes:
    """Load the low half of an argument: the kernel itself reads only that of these (little-endian machines)."""
    return _instruction(_LOAD, _ARGUMENTS + 8 * index)


def _pretend() -> bytes:
    """Leave the call out, and answer that it was done."""
    return _instruction(_RETURN, _ERRNO)


def _refuse(number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | number)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
