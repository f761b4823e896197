"""Look-ups of names that nobody answers: they hold up the sandbox that asks, and no other."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

import pytest

from ash_hub.egress.capacity import Capacity, Share
from ash_hub.egress.limits import Limits
from ash_hub.egress.names import Address
from ash_hub.egress.resolver import SystemResolver
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.egress.egress_parts import WAIT_SECONDS, ask, error_of, get, proxying
from tests.hub.egress.test_egress_process import Process, asked, process

pytestmark = pytest.mark.anyio

STUCK, AT_ONCE, ASKED = 9, 8, 12
"""Sandboxes that ask for names without an answer, how many look-ups each may have at once, how many it begins."""
NEVER = 3600.0
"""Seconds; longer than any test waits for an answer."""
NAME_SERVER = """
import socket, struct, threading
def name_server(asked):
    while True:
        question, whom = asked.recvfrom(512)
        if b"stuck" in question: continue
        end = question.index(0, 12) + 5
        is_four = question[end - 4 : end - 2] == bytes([0, 1])
        record = struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton("127.0.0.1") if is_four else b""
        head = question[:2] + struct.pack("!HHHHH", 0x8180, 1, is_four, 0, 0)
        asked.sendto(head + question[12:end] + record, whom)
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.bind(("127.0.0.1", 53))
threading.Thread(target=name_server, args=(asked,), daemon=True).start()
"""
"""A name server that says loopback for every name, and nothing for a name with `stuck` in it."""


@contextmanager
def beside_a_name_server(folder: Path) -> Generator[Process]:
    """Start the proxy where the C library's one name server answers as above, and is waited for half a minute."""
    launcher = "bwrap --unshare-user --unshare-net --cap-add CAP_NET_BIND_SERVICE --ro-bind / / --dev /dev".split()
    if os.geteuid() != 0:
        launcher += ["--uid", "0", "--gid", "0"]
    files = {
        "/etc/resolv.conf": "nameserver 127.0.0.1\noptions timeout:30 attempts:1",
        "/etc/nsswitch.conf": "hosts: dns",
    }
    for path, text in files.items():
        own = folder / Path(path).name
        own.write_text(f"{text}\n")
        launcher += ["--ro-bind", str(own), os.path.realpath(path)]
    with process(*launcher, before=NAME_SERVER) as it:
        assert it.told()["ready"] is True
        yield it


def listeners(folder: Path, stack: ExitStack, count: int) -> Iterator[socket.socket]:
    for number in range(count):
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / f"p{number}"))
        listener.listen(ASKED)
        yield listener


def looking_up(it: Process) -> dict[str, int]:
    """Return how many look-ups of each sandbox are in the C library."""
    it.tell({"op": "stats", "n": 1})
    while "stats" not in (told := it.told()):
        pass
    return {name: counts["look_ups"] for name, counts in told["stats"].items()}


@needs_isolation
def test_sandboxes_whose_names_never_resolve_keep_no_other_waiting(tmp_path: Path) -> None:
    with ExitStack() as stack, beside_a_name_server(tmp_path) as it:
        *stuck, free = listeners(tmp_path, stack, STUCK + 1)
        for number, listener in enumerate((*stuck, free)):
            limits = {"connect_seconds": NEVER}
            it.tell({"op": "add", "id": f"sbx-{number}", "policy": "internet", "limits": limits}, listener)
        clients: list[socket.socket] = []
        for listener in stuck:
            for number in range(ASKED):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                clients.append(client)
                client.connect(listener.getsockname())
                client.sendall(get(f"http://stuck{number}.example/"))
        waiting = {f"sbx-{number}": AT_ONCE for number in range(STUCK)} | {f"sbx-{STUCK}": 0}
        end = time.monotonic() + WAIT_SECONDS
        while looking_up(it) != waiting:
            assert time.monotonic() < end, looking_up(it)
        for name in ("one.example", "two.example"):
            assert error_of(asked(free, get(f"http://{name}/")))["reason"] == "loopback"
        assert looking_up(it) == waiting and select.select(clients, [], [], 0)[0] == []


@dataclass
class Unanswered:
    """A resolver that answers when it is told to."""

    asked: list[str] = field(default_factory=list[str])
    answer: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, name: str, *, as_host_does: bool) -> Sequence[Address]:
        self.asked.append(name)
        await self.answer.wait()
        return [ip_address("127.0.0.1")]


async def test_a_look_up_keeps_its_place_until_it_ends_and_one_that_waits_in_vain_is_refused() -> None:
    names, limits = Unanswered(), Limits(look_ups=1, connect_seconds=0.05)
    async with proxying("internet", names=names, limits=limits) as it:
        first, second = [error_of(await ask(it.path, get(f"http://{name}.example/"))) for name in ("one", "two")]
        assert first["reason"] == "unresolved" and first["kind"] == "egress_failed"
        assert second["reason"] == "too_many_look_ups" and second["kind"] == "egress_refused"
        assert names.asked == ["one.example"] and it.proxy.stats()["look_ups"] == 1
        names.answer.set()
        async with asyncio.timeout(WAIT_SECONDS):
            late = {"unresolved", "too_many_look_ups"}  # on a busy machine
            while (reason := error_of(await ask(it.path, get("http://three.example/")))["reason"]) in late:
                pass
        assert reason == "loopback"
        assert it.proxy.stats()["look_ups"] == 0


async def test_a_look_up_for_which_there_is_no_thread_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", start)
    with pytest.raises(OSError, match="no thread"):
        await SystemResolver()("example.com", as_host_does=False)


async def in_turn(share: Share, name: str, order: list[str]) -> None:
    await share.enter()
    order.append(name)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_places_go_round_among_those_that_wait_and_the_first_of_each_is_always_there() -> None:
    room = Capacity(3)
    greedy, modest, late = (Share(room, 3) for _ in range(3))
    for _ in range(3):
        await greedy.enter()
    for share in (modest, late):
        await share.enter()  # although the room is full
    order: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        for share, name in ((greedy, "greedy"), (greedy, "greedy"), (modest, "modest"), (late, "late")):
            tasks.create_task(in_turn(share, name, order))
        await settle()
        for so_far in (
            [],
            [],  # the room is still as full as it may be
            ["greedy"],
            ["greedy", "modest", "greedy"],  # the last place of all goes to the next, and the first of its own to it
        ):
            greedy.leave()
            await settle()
            assert order == so_far
        greedy.leave()
        await settle()
        assert order == ["greedy", "modest", "greedy"]
        modest.leave()
        await settle()
        assert order == ["greedy", "modest", "greedy", "late"]
    assert (greedy.taken, modest.taken, late.taken) == (0, 1, 2)


async def test_a_place_that_is_given_to_nobody_any_more_goes_on() -> None:
    share = Share(Capacity(1), 1)
    await share.enter()
    first, second, third = (asyncio.create_task(share.enter()) for _ in range(3))
    await settle()
    first.cancel()  # while it waits
    await settle()
    share.leave()
    second.cancel()  # when it has just been given the place
    await third
    assert share.taken == 1 and first.cancelled() and second.cancelled()
