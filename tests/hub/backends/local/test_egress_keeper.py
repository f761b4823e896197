"""What the keeper does about an egress proxy that the kernel lets it tell nothing for a while."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.local.keeper import egress, sandbox

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class NoRoom:
    """A kernel without room for a message, and the timers that are set meanwhile."""

    def __init__(self) -> None:
        self.tries = 0
        self.timers: list[Callable[[], None]] = []

    def send(self, *_: object) -> int:
        self.tries += 1
        raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

    def later(self, _: float, callback: Callable[[], None]) -> asyncio.Handle:
        self.timers.append(callback)
        return asyncio.Handle(callback, (), asyncio.get_running_loop())


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> NoRoom:
    room = NoRoom()
    monkeypatch.setattr(egress, "_proxy_process", idle_process)
    monkeypatch.setattr("ash_hub.backends.local.keeper.egress.socket.send_fds", room.send)
    return room


def idle_process(_: object) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with theirs:
        return ours, subprocess.Popen(["sleep", "60"], stdin=theirs.fileno())


async def test_one_timer_tries_again_however_much_waits_to_be_said(
    no_room: NoRoom, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", no_room.later)
    network: dict[str, Any] = {"policy": "none", "limits": {}}
    it = egress.Egress([], lambda _: None)
    try:
        it.add("sbx-1", sandbox.bind_listener(str(tmp_path / "first")), network)
        for port in range(20):
            it.hive_listens_on([port])
        assert len(no_room.timers) == 1
        before = no_room.tries
        no_room.timers[0]()
        assert (no_room.tries, len(no_room.timers)) == (before + 1, 2)
        it.end()
        it.add("sbx-2", sandbox.bind_listener(str(tmp_path / "second")), network)
        assert len(no_room.timers) == 3  # the one before was called off
    finally:
        it.end()


async def test_a_change_is_followed_once_its_own_number_is_told_or_no_proxy_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(egress, "_proxy_process", idle_process)
    it = egress.Egress([], lambda _: None)
    try:
        served = it.add("sbx-1", sandbox.bind_listener(str(tmp_path / "s")), {"policy": "internet", "limits": {}})
        first, second = it.set_policy("sbx-1", "none"), it.set_policy("sbx-1", ["a.test"])
        it._settle("sbx-1", 2)  # pyright: ignore[reportPrivateUsage] - as its message does
        assert served.done() and first.done() and not second.done()
        it._died()  # pyright: ignore[reportPrivateUsage]
        assert it.set_policy("sbx-1", "none").done()
        it.remove("sbx-1")
        assert second.done()
    finally:
        it.end()
