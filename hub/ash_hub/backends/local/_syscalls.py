"""Numbers of the system calls that the filter names, from the kernel's `unistd.h`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One machine, as seccomp sees it."""

    audit: int
    """Its `AUDIT_ARCH_*` value."""
    numbers: Mapping[str, int]


def _numbers(table: str) -> dict[str, int]:
    pairs = (entry.split() for entry in table.split(",") if entry.strip())
    return {name: int(number) for name, number in pairs}


_X86_64 = _numbers(
    """
    _sysctl 156, acct 163, add_key 248, bpf 321, chroot 161, clock_settime 227, clone 56, clone3 435,
    create_module 174, delete_module 176, fanotify_init 300, fcntl 72, finit_module 313, fsconfig 431, fsmount 432,
    fsopen 430, fspick 433, init_module 175, io_setup 206, io_uring_enter 426, io_uring_register 427,
    io_uring_setup 425, ioctl 16, ioperm 173, iopl 172, kcmp 312, kexec_file_load 320, kexec_load 246, keyctl 250,
    lookup_dcookie 212, migrate_pages 256, modify_ldt 154, mount 165, mount_setattr 442, move_mount 429,
    move_pages 279, name_to_handle_at 303, nfsservctl 180, open_by_handle_at 304, open_tree 428, open_tree_attr 467,
    perf_event_open 298, pidfd_getfd 438, pivot_root 155, process_madvise 440, process_vm_readv 310,
    process_vm_writev 311, prlimit64 302, ptrace 101, quotactl 179, quotactl_fd 443, reboot 169, request_key 249,
    setdomainname 171, sethostname 170, setns 308, setrlimit 160, settimeofday 164, socket 41, socketpair 53,
    swapoff 168, swapon 167, sysfs 139, syslog 103, umount2 166, unshare 272, uselib 134, userfaultfd 323, ustat 136,
    vhangup 153, vserver 236
    """
)

_AARCH64 = _numbers(
    """
    acct 89, add_key 217, bpf 280, chroot 51, clock_settime 112, clone 220, clone3 435, delete_module 106,
    fanotify_init 262, fcntl 25, finit_module 273, fsconfig 431, fsmount 432, fsopen 430, fspick 433, init_module 105,
    io_setup 0, io_uring_enter 426, io_uring_register 427, io_uring_setup 425, ioctl 29, kcmp 272, kexec_file_load 294,
    kexec_load 104, keyctl 219, lookup_dcookie 18, migrate_pages 238, mount 40, mount_setattr 442, move_mount 429,
    move_pages 239, name_to_handle_at 264, nfsservctl 42, open_by_handle_at 265, open_tree 428, open_tree_attr 467,
    perf_event_open 241, pidfd_getfd 438, pivot_root 41, process_madvise 440, process_vm_readv 270,
    process_vm_writev 271, prlimit64 261, ptrace 117, quotactl 60, quotactl_fd 443, reboot 142, request_key 218,
    setdomainname 162, sethostname 161, setns 268, setrlimit 164, settimeofday 170, socket 198, socketpair 199,
    swapoff 225, swapon 224, syslog 116, umount2 39, unshare 97, userfaultfd 282, vhangup 58
    """
)

ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, _X86_64),
    "aarch64": Architecture(0xC00000B7, _AARCH64),
}
"""By the name that `os.uname().machine` gives."""
