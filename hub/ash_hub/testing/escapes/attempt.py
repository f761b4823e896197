"""An attempt to escape, and how it reports its outcome."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Attempt", "Outcome", "Verdict", "program", "verdict"]


class Verdict(StrEnum):
    """How an attempt ended."""

    ESCAPED = "escaped"
    STOPPED = "stopped"
    ABSENT = "absent"
    """What it attacks does not exist here, so nothing was shown."""
    SHARED = "shared"
    """The backend does not say that it bounds here what it takes or watches, so it was not made; or it is known not to
    stop this. What it is aimed at is the host's, and every sandbox has it."""
    BROKEN = "broken"
    """It could not be carried out; a fault of the attempt or of the sandbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One thing that hostile code does inside a sandbox."""

    name: str
    tries: str
    """What it does, as a sentence without its end: `reads …`."""
    script: str
    """Python, with `PRELUDE` before it; ends in `escaped(how)`, `stopped(by what)` or `absent(what)`."""
    stopped_by: tuple[str, ...]
    """The protections that stop it, each of which is enough: it succeeds where none of them is there."""
    bound: str | None = None
    """What a backend must say that it bounds for this to be made: a key of `Prison.bounds`, whose value the script has
    as `bound`. None is for what every backend must stop."""
    network: str | tuple[str, ...] = "none"
    """The network policy of the sandbox that it needs; `PORT` in an entry is the port of the bait."""
    fatal: bool = False
    """Whether it may end its own sandbox, or processes of it, by being stopped; then that counts as stopped."""
    watched: bool = False
    """Whether it is aimed at the hive and its other sandboxes; then it escapes, too, by what the hive takes meanwhile
    or by keeping a neighbour waiting."""

    serves: bool = False
    """Whether it is the main process of a sandbox of its own, in the runner's place; then the script is all of it, and
    what becomes of the hub that asks it is seen from outside."""

    def policy(self, port: int) -> str | tuple[str, ...]:
        """Return its network policy, where the bait listens on `port`."""
        if isinstance(self.network, str):
            return self.network
        return tuple(entry.replace("PORT", str(port)) for entry in self.network)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt; as text, what it tried and what stopped it."""

    attempt: Attempt
    verdict: Verdict
    how: str

    def __str__(self) -> str:
        protections = " and ".join(self.attempt.stopped_by)
        by = f" [{protections}]" if self.verdict is Verdict.STOPPED else ""
        return f"{self.attempt.name}: {self.attempt.tries} -> {self.verdict}: {self.how}{by}"


PRELUDE = """
import ctypes, errno, glob, json, os, socket, stat, struct, subprocess, sys, threading, time
bait = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def _end(word, text):
    os.write(1, f"{word} {text}\\n".encode())
    os._exit(0)
def escaped(how): _end("escaped", how)
def stopped(by): _end("stopped", by)
def absent(what): _end("absent", what)
def reason(error): return f"{errno.errorcode.get(error.errno, error.errno)}: {error.strerror}"
def text(path):
    try:
        with open(path, "rb") as file: return file.read(1 << 20).decode(errors="replace")
    except OSError: return ""
def system_call(number, *words):
    ctypes.set_errno(0)
    result = libc.syscall(*(ctypes.c_long(word) for word in (number, *words)))
    return result, ctypes.get_errno()
def surprise(kind, error, trace):
    if isinstance(error, OSError): stopped(reason(error))
    sys.__excepthook__(kind, error, trace)
    os._exit(70)
sys.excepthook = surprise
"""
"""What every script may use. An `OSError` that a script lets go is what stopped it."""


def program(attempt: Attempt, bait: Mapping[str, Any]) -> list[str]:
    """Return the command that makes the attempt."""
    given = "" if attempt.bound is None else f"bound = bait['bounds'][{attempt.bound!r}]\n"
    return ["python3", "-c", PRELUDE + given + attempt.script, json.dumps(bait)]


def verdict(attempt: Attempt, code: int, out: str, error: str) -> Outcome:
    """Read what an attempt said of itself, or what its end says."""
    for line in out.splitlines():
        word, _, rest = line.partition(" ")
        if word in (Verdict.ESCAPED, Verdict.STOPPED, Verdict.ABSENT):
            return Outcome(attempt, Verdict(word), rest)
    if attempt.fatal and code in (-9, 137):
        return Outcome(attempt, Verdict.STOPPED, "the kernel killed it")
    if attempt.fatal and "MemoryError" in error:
        return Outcome(attempt, Verdict.STOPPED, "no memory was given to it")
    return Outcome(attempt, Verdict.BROKEN, f"exit code {code}: {error.strip()[-400:]}")
