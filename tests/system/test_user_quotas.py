"""Kernel quotas that a hive shares with its sandboxes and with whatever else its user runs, used up to the last."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ash_hub.bench.wire import modern_call
from ash_mcp.wire import FAILURE_META_KEY
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.crash_parts import Home, home

pytestmark = [
    pytest.mark.heavy,
    needs_isolation,
    # Root's own quota is everybody's who runs tests here.
    pytest.mark.skipif(os.geteuid() == 0, reason="uses up what all processes of its user share: not root's"),
]

SECONDS = 60
MOST_SPAWNS = 40
IDLE_SECONDS = 5.5
"""After which a hive has closed an idle connection to a sandbox."""
MOST_WATCHES = 20_000_000
WATCHES = """
import os, resource, select, sys, threading, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
files = [os.eventfd(0) for _ in range(min(8000, hard // 2))]
epolls, full = [], False
while True:
    epolls.append(select.epoll())
    for file in files:
        while True:
            try:
                epolls[-1].register(file, 0)
                break
            except OSError:
                if not full:
                    full = True
                    print("full", flush=True)
                time.sleep(0.001)
"""
"""Takes every watch that there is, and each that comes free, until its stdin ends."""
TAKE = """
import ctypes, fcntl, os, resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
libc, taken = ctypes.CDLL(None, use_errno=True), []
def take():
    {take}
try:
    while True:
        taken.append(take())
except OSError:
    pass
print("full", flush=True)
sys.stdin.read()
"""
"""Takes one after the other until it is refused, and keeps them until its stdin ends."""
TAKERS = {
    "inotify instances": """
    made = libc.inotify_init1(0)
    if made < 0:
        raise OSError(ctypes.get_errno(), "no instance more")
    return made""",
    "terminals": """
    return os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)""",
    "pipe pages": """
    pipe = os.pipe()
    fcntl.fcntl(pipe[0], 1031, 1 << 20)  # F_SETPIPE_SZ
    return pipe""",
}


@contextmanager
def taken(program: str) -> Generator[None]:
    """Have another process of this user take all there is of something."""
    words = [sys.executable, "-I", "-S", "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as taker:
        assert taker.stdin is not None and taker.stdout is not None
        try:
            assert taker.stdout.readline() == "full\n"
            yield
        finally:
            taker.stdin.close()
            taker.wait(SECONDS)


@dataclass
class Wire:
    """A connection to a hive without any event loop, which would need what is taken."""

    stream: socket.socket

    def ask(self, request: bytes) -> tuple[int, dict[str, Any]]:
        self.stream.sendall(request)
        with HTTPResponse(self.stream) as answer:
            answer.begin()
            text = answer.read().decode()
        lines = [line.removeprefix("data:") for line in text.splitlines() if line.startswith("data:")]
        return answer.status, json.loads(lines[-1] if lines else text)

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Call a tool and return its result, which may be an error."""
        status, answer = self.ask(modern_call("tools/call", {"name": name, "arguments": arguments}, {}))
        assert status == 200, answer
        return answer["result"]

    def works(self, session: str) -> bool:
        return self.call(f"{session}_echo", text="x").get("structuredContent") == {"text": "x"}


@contextmanager
def wire(url: str) -> Generator[Wire]:
    where = urlsplit(url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=SECONDS) as stream:
        yield Wire(stream)


def failure_of(result: dict[str, Any]) -> dict[str, Any]:
    assert result["isError"], result
    return result["_meta"][FAILURE_META_KEY]


def is_ours(failure: dict[str, Any]) -> bool:
    return failure["retryable"] and not failure.get("trainable", False)


def spawned(url: str, session: str) -> bool:
    with wire(url) as fresh:
        return not fresh.call("spawn", recipe="echo", session=session).get("isError", False)


def first_refused_spawn(kept: Wire) -> dict[str, Any]:
    """Spawn until the hive has used up what it had put by."""
    for number in range(MOST_SPAWNS):
        made = kept.call("spawn", recipe="echo", session=f"more{number}")
        if made.get("isError"):
            return made
    raise AssertionError("it was never refused")


def first_refused_call(kept: Wire) -> dict[str, Any]:
    """Call now and then, until no connection is left of those that were open before."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        called = kept.call("first_echo", text="x")
        if called.get("isError"):
            return called
        assert called["structuredContent"] == {"text": "x"}
        time.sleep(IDLE_SECONDS)
    raise AssertionError("it was never refused")


@contextmanager
def hive_of_two(place: Home) -> Generator[tuple[str, Wire]]:
    url = place.start()
    with wire(url) as kept:
        for session in ("first", "second"):
            assert not kept.call("spawn", recipe="echo", session=session).get("isError", False)
            assert kept.works(session)
        yield url, kept


def require_watches() -> None:
    if int(Path("/proc/sys/fs/epoll/max_user_watches").read_text()) > MOST_WATCHES:
        pytest.skip("it would take too long to use up what this host allows")


def test_a_hive_outlives_the_last_watch_of_its_user_and_serves_on() -> None:
    require_watches()
    with home() as place, hive_of_two(place) as (url, kept):
        hub = place.hubs[-1]
        with taken(WATCHES):
            until = time.monotonic() + 2.0
            while time.monotonic() < until:
                assert kept.works("first") and kept.works("second")
            with wire(url) as refused:
                status, answer = refused.ask(modern_call("tools/list", {}, {}))
            assert status == 503 and answer["error"]["kind"] == "capacity_exceeded" and is_ours(answer["error"])
            assert "fs.epoll.max_user_watches" in answer["error"]["message"]
            failure = failure_of(first_refused_spawn(kept))
            assert failure["kind"] == "start_failed" and is_ours(failure) and "No space left" in failure["message"]
            failure = failure_of(first_refused_call(kept))
            assert failure["kind"] == "connect_failed" and is_ours(failure) and "No space left" in failure["message"]
            assert hub.poll() is None, place.said()
        assert spawned(url, "third")
        assert all(kept.works(session) for session in ("first", "second", "third"))
        assert place.stop_hub() == 0


def test_a_hive_that_cannot_start_says_why_and_its_successor_has_every_sandbox() -> None:
    require_watches()
    with home() as place:
        with hive_of_two(place), taken(WATCHES):
            place.kill_hub()
            with pytest.raises(AssertionError, match="the hub says"):
                place.start()
            assert "fs.epoll.max_user_watches" in place.said() and "Traceback" not in place.said()
            assert place.stop_hub() == 1
        with wire(place.start()) as fresh:
            assert fresh.works("first") and fresh.works("second")
        assert place.stop_hub() == 0


@pytest.mark.parametrize("what", TAKERS)
def test_a_hive_makes_and_serves_sandboxes_while_its_user_has_used_up(what: str) -> None:
    with home() as place, hive_of_two(place) as (url, kept):
        with taken(TAKE.format(take=TAKERS[what].strip())):
            assert spawned(url, "third")
            assert all(kept.works(session) for session in ("first", "second", "third"))
            with wire(url) as fresh:
                said = fresh.call("third_echo", text="x" * 100_000)
            assert said["structuredContent"] == {"text": "x" * 100_000}
        assert spawned(url, "fourth") and kept.works("fourth")
        assert place.stop_hub() == 0
