"""Reasons why a host refuses user namespaces, each with the command that allows them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["namespace_fix", "sysctl"]

_PROFILE = (
    "write `abi <abi/4.0>, include <tunables/global> profile {name} {program} flags=(unconfined) {{ userns, }}` "
    "to /etc/apparmor.d/{name} and run `sudo apparmor_parser -r /etc/apparmor.d/{name}`, or run "
    "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
)


def namespace_fix(program: str, read: Callable[[str], str] | None = None) -> str:
    """Return what lets a program make user namespaces here.

    Args:
        read: Returns the kernel's settings, as `sysctl` does.
    """
    value_of = sysctl if read is None else read
    if value_of("kernel/apparmor_restrict_unprivileged_userns") == "1":
        profile = _PROFILE.format(name=os.path.basename(program), program=program)
        return f"AppArmor forbids user namespaces here: {profile}"
    if value_of("kernel/unprivileged_userns_clone") == "0":
        return "unprivileged user namespaces are off: run `sudo sysctl kernel.unprivileged_userns_clone=1`"
    if value_of("user/max_user_namespaces") == "0":
        return "user namespaces are off: run `sudo sysctl user.max_user_namespaces=15000`"
    return (
        "allow user namespaces and mounts: in a container start it with `--security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined`, or run the hive on the host"
    )


def sysctl(name: str) -> str:
    """Return the value of a setting of the kernel; empty where there is none."""
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""
