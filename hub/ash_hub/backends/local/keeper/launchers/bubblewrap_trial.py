"""A trial of this host's bubblewrap: its version, and whether it can isolate a process here."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

__all__ = ["find_bubblewrap", "try_bubblewrap", "version_of"]

_TRIAL_SECONDS = 10.0


def find_bubblewrap() -> tuple[str, frozenset[str]]:
    """Return its path, empty where there is none, and the options that it knows."""
    program = shutil.which("bwrap") or ""
    if not program:
        return "", frozenset()
    said = _said(program, "--help")
    return program, frozenset(re.findall(r"^\s+(--[a-z0-9-]+)", said.stdout + said.stderr, re.MULTILINE))


def version_of(program: str) -> str:
    return _said(program, "--version").stdout.strip()


def _said(program: str, option: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, option], capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)


def try_bubblewrap(
    program: str,
    known: frozenset[str],
    *,
    directories: Sequence[str],
    links: Mapping[str, str],
    system_call_filter: bytes | None,
) -> str | None:
    """Start and end an isolated process; return why that failed, or None.

    Args:
        known: The options of this bubblewrap.
        directories: Top-level directories of the system.
        links: Top-level links of it.
    """
    options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--as-pid-1"]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for path in directories:
        options += ["--ro-bind", path, path]
    for path, target in links.items():
        options += ["--symlink", target, path]
    if "--disable-userns" in known:
        options.append("--disable-userns")
    with tempfile.TemporaryFile() as code:
        if system_call_filter is not None:
            code.write(system_call_filter)
            code.seek(0)
            options += ["--seccomp", str(code.fileno())]
        try:
            done = subprocess.run(
                [program, *options, "--", "true"],
                capture_output=True,
                text=True,
                timeout=_TRIAL_SECONDS,
                pass_fds=(code.fileno(),),
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
