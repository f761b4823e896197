"""Who owns the other end of a loopback connection, asked of a real kernel."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ash_router.admission import peers
from ash_router.admission.peers import Address, Peers, peer_user

LookUp = Callable[[Address, Address], int | None]

OTHER_USER = 65534


WAYS = [pytest.param(peers.ask_kernel, id="netlink"), pytest.param(peers.read_proc, id="proc")]


@contextmanager
def connection(family: socket.AddressFamily, host: str) -> Generator[tuple[socket.socket, Address, Address]]:
    with socket.create_server((host, 0), family=family) as listener:
        with socket.socket(family) as client:
            client.connect(listener.getsockname())
            accepted, address = listener.accept()
            with accepted:
                yield client, address[:2], accepted.getsockname()[:2]


@pytest.mark.parametrize("look_up", WAYS)
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_our_own_connection_is_ours(look_up: LookUp, family: socket.AddressFamily, host: str) -> None:
    with connection(family, host) as (_, client, server):
        assert look_up(client, server) == os.geteuid()


@pytest.mark.parametrize("look_up", WAYS)
def test_a_client_with_an_ipv6_socket_on_an_ipv4_address_is_found(look_up: LookUp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("::ffff:127.0.0.1", port)):
            accepted, address = listener.accept()
            with accepted:
                assert look_up(address, accepted.getsockname()) == os.geteuid()
                assert look_up((f"::ffff:{address[0]}", address[1]), accepted.getsockname()) == os.geteuid()


@pytest.mark.parametrize("look_up", WAYS)
def test_a_socket_that_its_process_has_closed_is_nobodys(look_up: LookUp) -> None:
    """The kernel shows it as root's: a stranger could send a request, close, and pass for root."""
    with connection(socket.AF_INET, "127.0.0.1") as (client, near, far):
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client.close()
        assert look_up(near, far) is None


@pytest.mark.parametrize("look_up", WAYS)
def test_a_half_closed_connection_still_has_its_owner(look_up: LookUp) -> None:
    with connection(socket.AF_INET, "127.0.0.1") as (client, near, far):
        client.shutdown(socket.SHUT_WR)
        assert look_up(near, far) == os.geteuid()


@pytest.mark.parametrize("look_up", WAYS)
def test_a_listener_on_the_clients_address_does_not_count(look_up: LookUp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert look_up(listener.getsockname(), ("127.0.0.1", 9)) is None


@pytest.mark.parametrize("look_up", WAYS)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a socket of another user")
def test_another_users_connection_is_theirs(look_up: LookUp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.seteuid(OTHER_USER)  # a socket belongs for good to whoever made it
        try:
            stranger = socket.create_connection(listener.getsockname())
        finally:
            os.seteuid(0)
        accepted, address = listener.accept()
        with stranger, accepted:
            assert look_up(address, accepted.getsockname()) == OTHER_USER
            assert not Peers([0], look_up).welcome(Connection(), address, accepted.getsockname())


def test_where_the_kernel_does_not_answer_proc_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(client: Address, server: Address) -> int | None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(peers, "ask_kernel", refuse)
    with connection(socket.AF_INET, "127.0.0.1") as (_, client, server):
        assert peer_user(client, server) == os.geteuid()


class Host:
    """A host whose connections belong to `owner`; counts how often it is asked."""

    def __init__(self, owner: int | OSError | None) -> None:
        self.owner = owner
        self.asked = 0

    def __call__(self, client: Address, server: Address) -> int | None:
        self.asked += 1
        if isinstance(self.owner, OSError):
            raise self.owner
        return self.owner


class Connection:
    """Stands for a connection by its identity."""


NEAR, FAR = ("127.0.0.1", 1), ("127.0.0.1", 2)


def test_a_connection_is_looked_up_once_and_forgotten_with_it() -> None:
    host = Host(1000)
    known = Peers([1000], host)
    first = Connection()
    assert all(known.welcome(first, NEAR, FAR) for _ in range(5))
    assert host.asked == 1
    # the same address a moment later may be another user's
    host.owner = 1001
    assert known.welcome(first, NEAR, FAR)
    assert not known.welcome(Connection(), NEAR, FAR)
    assert host.asked == 2


@pytest.mark.parametrize("owner", [None, OSError(24, "no descriptors")])
def test_a_peer_that_cannot_be_found_out_may_not_come_in(owner: OSError | None) -> None:
    assert not Peers([0, os.geteuid()], Host(owner)).welcome(Connection(), NEAR, FAR)


def test_a_connection_without_addresses_may_not_come_in() -> None:
    assert not Peers([0], Host(0)).welcome(Connection(), None, FAR)


def test_this_host_says_whether_it_tells() -> None:
    assert Peers([0]).problem() is None
    assert Peers([0], Host(OSError(2, "no sock_diag"))).problem() == "no sock_diag"
    assert "belongs to user 4711" in (Peers([0], Host(4711)).problem() or "")


@pytest.mark.parametrize("look_up", WAYS)
def test_addresses_may_be_as_long_as_the_kernel_gives_them(look_up: Callable[[Any, Any], int | None]) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as client:
            assert len(client.getsockname()) == 4
            assert look_up(client.getsockname(), client.getpeername()) == os.geteuid()


@pytest.mark.parametrize("look_up", WAYS)
def test_a_connection_that_does_not_exist_is_nobodys(look_up: LookUp) -> None:
    assert look_up(("127.0.0.1", 1), ("127.0.0.1", 9)) is None


def test_a_connection_that_has_no_identity_is_looked_up_each_time() -> None:
    host = Host(1000)
    known = Peers([1000], host)
    assert [known.welcome(None, NEAR, FAR) for _ in range(2)] == [True, True]
    assert host.asked == 2


@pytest.mark.parametrize(("near", "far"), [(None, FAR), (NEAR, None), (None, None)])
def test_half_of_a_connection_is_not_looked_up(near: Address | None, far: Address | None) -> None:
    host = Host(0)
    assert not Peers([0], host).welcome(Connection(), near, far) and host.asked == 0


def test_an_address_that_is_none_may_not_come_in() -> None:
    assert not Peers([os.geteuid()]).welcome(Connection(), ("nowhere", 1), FAR)


class Kernel:
    """A netlink socket whose answer is given."""

    answer = b""

    def __init__(self, *_: int) -> None:
        pass

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def send(self, request: bytes) -> None:
        (length,) = struct.unpack_from("=I", request)
        assert length == len(request)

    def recv(self, _: int) -> bytes:
        return self.answer


def found(kind: int, *, ports: tuple[int, int] = (1, 2), user: int = 1000, inode: int = 7) -> bytes:
    head = struct.pack("=IHHII", 88, kind, 0, 1, 0)
    return (head + bytes(4) + struct.pack("!HH", *ports)).ljust(80, b"\0") + struct.pack("=II", user, inode)


@pytest.mark.parametrize(
    ("answer", "user"),
    [
        (found(20), 1000),
        (found(20, user=0, inode=1), 0),
        (found(20, inode=0), None),
        (found(20, ports=(1, 3)), None),
        (found(21), None),
        (struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -2), None),
    ],
)
def test_the_kernels_answer_is_believed_only_of_the_connection_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, user: int | None
) -> None:
    monkeypatch.setattr(Kernel, "answer", answer)
    monkeypatch.setattr(peers.socket, "socket", Kernel)
    assert peers.ask_kernel(NEAR, FAR) == user


def test_a_kernel_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "answer", struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -13))
    monkeypatch.setattr(peers.socket, "socket", Kernel)
    with pytest.raises(PermissionError) as refused:
        peers.ask_kernel(NEAR, FAR)
    assert (refused.value.errno, refused.value.strerror) == (13, os.strerror(13))


REST = "01 00000000:00000000 00:00000000 00000000 "
LINE = f"   0: 0100007F:0001 0100007F:0002 {REST} 1000        0 {{inode}} 1 0 20 4 30 10 -1"
MAPPED = "0000000000000000FFFF00000100007F"
LINE6 = f"   0: {MAPPED}:0001 {MAPPED}:0002 {REST} 1001        0 9 1 0 20 4 30 10 -1"


@pytest.mark.skipif(sys.byteorder != "little", reason="the tables are written in the machine's own order")
@pytest.mark.parametrize(
    ("tables", "user"),
    [
        ({"tcp": LINE.format(inode=7)}, 1000),
        ({"tcp": LINE.format(inode=0)}, None),
        ({"tcp6": LINE6}, 1001),
        ({"tcp": LINE.replace(":0002", ":0003").format(inode=7), "tcp6": LINE6}, 1001),
        ({"tcp": ""}, None),
    ],
)
def test_each_table_that_is_there_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tables: dict[str, str], user: int | None
) -> None:
    for name, line in tables.items():
        (tmp_path / name).write_text(f"{LINE.format(inode=1).replace('1000', '4711')}\n{line}\n")
    monkeypatch.setattr(peers, "_TABLES", tmp_path)
    assert peers.read_proc(NEAR, FAR) == user


def test_a_host_without_tables_does_not_let_us_look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "_TABLES", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither sock_diag nor") as refused:
        peers.read_proc(NEAR, FAR)
    assert refused.value.errno == 2
