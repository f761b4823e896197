"""Who owns the other end of a loopback connection, asked of a real kernel."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest

from ash_router import peers
from ash_router.peers import Address, Peers, peer_user

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
