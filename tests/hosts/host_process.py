"""A host as a process with a home of its own, bounded in time; whatever it started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["host_environment", "run_host"]

_END_SECONDS: Final = 10.0


def host_environment(*, home: Path, hosts_bin: Path, proxy: str) -> Mapping[str, str]:
    """Return the environment of a host, with nothing of the caller's.

    Args:
        home: A folder of its own.
        hosts_bin: Where the hosts and their Node are.
        proxy: Whom it asks for what is not on loopback.
    """
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return {
        "HOME": str(home),
        "PATH": f"{hosts_bin}:{os.environ['PATH']}",
        "LANG": "C.UTF-8",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **dict.fromkeys(names, proxy),
    }


def run_host(command: Sequence[str], *, env: Mapping[str, str], cwd: Path, seconds: float) -> str:
    """Run a host to its end and return what it wrote.

    Raises:
        AssertionError: It did not end in time, or what it started cannot be ended.
    """
    written = cwd.with_name("output")
    with written.open("ab") as output:
        host = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            host.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command[0]} ran for {seconds} s: {_tail(written)}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait(_END_SECONDS)
            _end_leftovers(env["HOME"])
    return _tail(written)


def _tail(file: Path) -> str:
    return file.read_text(errors="replace")[-6000:]


def _end_leftovers(home: str) -> None:
    """End what the host left: daemons and servers have groups of their own, so the home they were given finds them."""
    deadline = time.monotonic() + _END_SECONDS
    while left := _leftovers(home):
        assert time.monotonic() < deadline, f"left running: {left}"
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _leftovers(home: str) -> Mapping[int, str]:
    """Return the processes that have this home, with their command lines."""
    mark, found = f"HOME={home}".encode(), dict[int, str]()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found
