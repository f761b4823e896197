"""The egress proxy as a process of its own, started as the keeper starts it."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ash_hub.egress.resolver import HostWatch, SystemResolver
from ash_hub.egress.starting import proxy_command
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.egress.egress_parts import WAIT_SECONDS, error_of, get

pytestmark = pytest.mark.anyio

PUBLIC = "93.184.216.34"
NAME_SERVER = f"""
import http.server, itertools, socket, struct, threading
first = itertools.chain([{PUBLIC!r}], itertools.repeat("127.0.0.1"))
def name_server(asked):
    while True:
        question, whom = asked.recvfrom(512)
        end = question.index(0, 12) + 5
        is_four = question[end - 4 : end - 2] == bytes([0, 1])
        record = struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(next(first)) if is_four else b""
        head = question[:2] + struct.pack("!HHHHH", 0x8180, 1, is_four, 0, 0)
        asked.sendto(head + question[12:end] + record, whom)
asked = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asked.bind(("127.0.0.1", 53))
threading.Thread(target=name_server, args=(asked,), daemon=True).start()
web = http.server.HTTPServer(("127.0.0.1", 80), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=web.serve_forever, daemon=True).start()
"""
"""A name server whose first answer is a public address, and every other one loopback, where a web server listens."""


@dataclass
class Process:
    control: socket.socket
    child: subprocess.Popen[bytes]

    def tell(self, message: dict[str, Any], *listeners: socket.socket) -> None:
        data, descriptors = json.dumps(message).encode(), [listener.fileno() for listener in listeners]
        until = time.monotonic() + 60
        while True:
            try:
                socket.send_fds(self.control, [data], descriptors)
                return
            except OSError as error:
                # a sandbox of this user, in another test, may have all that a user can have in flight
                if error.errno != errno.ETOOMANYREFS or time.monotonic() > until:
                    raise
            time.sleep(0.05)

    def told(self) -> dict[str, Any]:
        return json.loads(self.control.recv(1 << 18) or b"{}")


@contextmanager
def process(*launcher: str, before: str = "") -> Generator[Process]:
    """Start the proxy, with what comes before it in its process and in its command."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(WAIT_SECONDS)
        with theirs:
            *python, boot, place = proxy_command()
            command = [*launcher, *python, before + boot, place]
            child = subprocess.Popen(command, stdin=theirs.fileno(), env={"LANG": "C.UTF-8"}, cwd="/")
        try:
            yield Process(ours, child)
        finally:
            ours.close()
            assert child.wait(WAIT_SECONDS) == 0


@pytest.fixture
def listener(tmp_path: Path) -> Generator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "p"))
        found.listen()
        yield found


def asked(listener: socket.socket, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(WAIT_SECONDS)
        client.connect(listener.getsockname())
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as file:
            return file.read()


def test_it_serves_what_it_is_given_reports_and_ends_with_its_keeper(listener: socket.socket) -> None:
    with process() as it, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert it.told()["ready"] is True
        policy = [f"127.0.0.1:{port}", "example.com"]
        it.tell({"op": "configure", "own_ports": [port]})
        it.tell({"op": "add", "id": "sbx-1", "n": 1, "policy": policy, "limits": {"connections": 3}}, listener)
        assert it.told() == {"serves": "sbx-1", "n": 1}
        assert error_of(asked(listener, get(f"http://127.0.0.1:{port}/")))["reason"] == "hive"
        told = it.told()
        assert told["event"] == "egress" and told["sandbox"] == "sbx-1" and told["reason"] == "hive"
        assert told["address"] == "127.0.0.1" and told["policy"] == ", ".join(policy)
        it.tell({"op": "policy", "id": "sbx-1", "n": 2, "policy": "none"})
        it.tell({"op": "policy", "id": "sbx-unknown", "n": 3, "policy": "none"})
        assert it.told() == {"serves": "sbx-1", "n": 2}
        assert error_of(asked(listener, get("http://example.com/")))["reason"] == "no_network"
        assert it.told()["policy"] == "none"
        it.tell({"op": "stats", "n": 7})
        stats = it.told()
        assert stats["n"] == 7 and stats["stats"]["sbx-1"]["accepted"] == 2
        it.tell({"op": "remove", "id": "sbx-1"})
        it.tell({"op": "remove", "id": "sbx-1"})
        it.tell({"op": "stats", "n": 8})
        assert it.told() == {"n": 8, "stats": {}}


def test_it_has_no_privileges_and_no_way_back() -> None:
    with process() as it:
        ready = it.told()
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{it.child.pid}/status").read_text().splitlines()
            if "\t" in line
        )
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert ready["user"] != 0 and status["Uid"].split() == [str(ready["user"])] * 4
            assert status["Groups"].strip() == ""


@needs_isolation
def test_a_name_that_changes_is_dialled_at_the_address_that_was_checked(
    listener: socket.socket, tmp_path: Path
) -> None:
    """With the C library's own look-ups, in a network where nothing but loopback can be reached."""
    launcher = "bwrap --unshare-user --unshare-net --cap-add CAP_NET_BIND_SERVICE --ro-bind / / --dev /dev".split()
    if os.geteuid() != 0:
        launcher += ["--uid", "0", "--gid", "0"]  # else the capability is lost with the first exec
    for path, text in {"/etc/resolv.conf": "nameserver 127.0.0.1", "/etc/nsswitch.conf": "hosts: dns"}.items():
        own = tmp_path / Path(path).name
        own.write_text(f"{text}\n")
        launcher += ["--ro-bind", str(own), os.path.realpath(path)]
    with process(*launcher, before=NAME_SERVER) as it:
        assert it.told()["ready"] is True
        it.tell({"op": "add", "id": "sbx-1", "n": 1, "policy": "internet", "limits": {}}, listener)
        assert it.told() == {"serves": "sbx-1", "n": 1}
        for reason, address in (("unreachable", PUBLIC), ("loopback", "127.0.0.1")):
            assert error_of(asked(listener, get("http://rebind.example/")))["reason"] == reason
            told = it.told()
            assert told["reason"] == reason and told["address"] == address


async def test_a_name_is_looked_up_without_the_search_domains_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def look_up(name: bytes, _: None, type: int) -> list[Any]:
        asked.append(name)
        return [(2, type, 6, "", ("1.2.3.4", 0)), (10, type, 6, "", ("fe80::1%eth0", 0, 0, 2))] * 2

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    resolver = SystemResolver()
    assert [str(address) for address in await resolver("example.com", as_host_does=False)] == ["1.2.3.4"]
    await resolver("example.com", as_host_does=True)
    assert asked == [b"example.com.", b"example.com"]


def test_the_addresses_of_this_host_are_found() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        networks = HostWatch(frozenset)().networks
    assert "127.0.0.0/8" in [str(network) for network in networks]
    bound = [line.split()[0] for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    assert sum(network.version == 6 for network in networks) == len(set(bound))
