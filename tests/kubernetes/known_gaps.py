"""Attempts that pods do not stop, and why none of them leads out of one; by the names of `ATTEMPTS`.

A pod has what its image, its container runtime and its node give it. What Ash asks of them is in
`backends/kubernetes/pods.py`; the rest is whoever runs the cluster's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["GVISOR_GAPS", "RUNC_GAPS"]

_FILTER: Final = "the container runtime's default filter lets it through"
_OWN_PROCESSES: Final = "it reaches processes of its own namespace, and the runner's memory is closed to them"
_EVERY_POD: Final[Mapping[str, str]] = {
    "host users": "they are the image's",
    "devices by /sys": "it is read-only, as every pod's",
    "host's user namespace": "pods have one of their own by the pod template only (hostUsers: false)",
    "interfaces": "it is the pod's, and NetworkPolicies say where it leads",
}

RUNC_GAPS: Final[Mapping[str, str]] = _EVERY_POD | {
    "write kernel settings": "what the kernel lets everybody write in /proc is not masked: /proc/pressure",
    "kernel's secrets": "the runtime masks a part of /proc only",
    "control group": "its own name of the node, where the node has version 1 of control groups",
    "kernel: name_to_handle_at": f"{_FILTER}; opening such a handle is refused",
    "kernel: io_setup": _FILTER,
    "kernel: modify_ldt": _FILTER,
    "kernel: ptrace": _OWN_PROCESSES,
    "kernel: process_vm_readv": _OWN_PROCESSES,
    "kernel: process_vm_writev": _OWN_PROCESSES,
    "kernel: NETLINK_AUDIT sockets": f"{_FILTER}; without capabilities nothing can be asked by it",
    "kernel: MPTCP sockets": _FILTER,
    "kernel: UDP-Lite sockets": _FILTER,
    "kernel: ICMP sockets": _FILTER,
    "kernel: DCCP sockets": f"{_FILTER}; the kernel of the test has none",
    "kernel: socket pairs": f"{_FILTER}; the kernel makes none",
    "kernel: notices": f"{_FILTER}; its files are no inodes of the host",
    "kernel: core handler": "which program there is for cores is the node's to say",
    "kernel: core limit": "which program there is for cores is the node's to say",
    "kernel: TIOCSTI": f"{_FILTER}; no terminal of a pod's leads to the hive",
    "kernel: calls of i386": "the runtime's filter holds for them as well",
}

GVISOR_GAPS: Final[Mapping[str, str]] = _EVERY_POD | {
    "kernel's secrets": "they are those of gVisor's kernel, which is the pod's own",
    "control group": "it is one that gVisor made up",
    "flood: processor": "gVisor counts the time in which a task could run, and not that in which it did",
}
"""Calls to the kernel are left out: the one that answers is gVisor's, in the pod itself."""
