"""The host's facts, kept between starts: to find them takes longer than to start a server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ash_hub.backends.local import seccomp
from ash_hub.backends.local.plans import HostFacts
from ash_mcp.errors import ConfigError

__all__ = ["cache_directory", "facts_of_host"]

_KEPT_SECONDS = 24 * 3600.0


def cache_directory() -> Path:
    """Make the directory that all `ash wrap` of this user share, and return it.

    Raises:
        ConfigError: It cannot be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base) / "ash" / "wrap"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.geteuid():
            raise ConfigError(f"{path} belongs to another user; set XDG_CACHE_HOME to a directory of your own")
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}; set XDG_CACHE_HOME") from error
    return path


def facts_of_host(cache: Path) -> HostFacts:
    """Return this host's facts, found anew once a day, after a boot, and for another bubblewrap or Python.

    Raises:
        ConfigError: There is no bubblewrap.
    """
    program = shutil.which("bwrap")
    if sys.platform != "linux" or program is None:
        raise ConfigError("a server can be wrapped on Linux, with bubblewrap: install it, then see `ash doctor`")
    kept = cache / f"host-{_state(program)}.json"
    try:
        if time.time() - kept.stat().st_mtime < _KEPT_SECONDS:
            given: dict[str, Any] = json.loads(kept.read_text())
            facts = HostFacts(**dict[str, Any](given, options=frozenset(given["options"])))
            return replace(facts, seccomp=seccomp.for_machine(os.uname().machine))
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return _found(cache, kept)


def _found(cache: Path, kept: Path) -> HostFacts:
    from ash_hub.backends.local.host import host_facts

    facts = host_facts()
    content = json.dumps({**asdict(replace(facts, seccomp=None)), "options": sorted(facts.options)})
    for old in cache.glob("host-*.json"):
        old.unlink(missing_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(content)
    partial.rename(kept)
    return facts


def _state(program: str) -> str:
    """Name what the facts depend on."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    parts = (boot, program, os.stat(program).st_mtime_ns, sys.executable, __file__, os.geteuid(), os.getgid())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
