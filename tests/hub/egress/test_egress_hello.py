"""The name check of a tunnel against real TLS: servers that ask for a second hello, and early data."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import pytest

from ash_hub.egress.refusal import Refusal
from ash_hub.egress.tls import ALERT, asks_again, check_hello, read_hello
from ash_recipes.runner.forwarder import forwarding
from tests.hub.egress.egress_parts import (
    OK,
    WAIT_SECONDS,
    built_hello,
    certified,
    connect,
    get,
    proxying,
    server_name,
)
from tests.hub.egress.test_egress_process import process

pytestmark = pytest.mark.anyio

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the package openssl")
needs_stdbuf = pytest.mark.skipif(shutil.which("stdbuf") is None, reason="needs stdbuf, of the package coreutils")

GOOD, EVIL = "good.test", "evil.test"
"""Of the same length, so that one can stand in the other's place in a recorded hello."""
OTHER_GROUP = "secp384r1"
"""No client sends a key for it unasked, so a server that takes nothing else asks for a second hello."""
CHANGE_CIPHER = bytes.fromhex("14 0303 0001 01")
EARLY_DATA = b"\x17\x03\x03\0\x05early"
UNKNOWN_EXTENSION = 0x5A5A


def record(message: bytes) -> bytes:
    return b"\x16\x03\x03" + len(message).to_bytes(2) + message


def hellos() -> tuple[bytes, bytes, bytes]:
    """Return what OpenSSL says to a server of another group, twice, and what the server answers in between."""
    server, trusting = certified(GOOD)
    server.set_ecdh_curve(OTHER_GROUP)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server, server_hostname=GOOD)
    other = ssl.MemoryBIO()
    listening = server.wrap_bio(other, to_client, server_side=True)
    said: list[bytes] = []
    for _ in range(2):
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        said.append(to_server.read())
        if len(said) == 1:
            other.write(said[0])
            with suppress(ssl.SSLWantReadError):
                listening.do_handshake()
            answer = to_client.read()
            to_client.write(answer)
    return said[0], answer, said[1]  # pyright: ignore[reportPossiblyUnboundVariable]


def hidden_hello() -> tuple[bytes, bytes]:
    """Return a second hello for the forbidden name in two records, of which the last looks like a hello by itself.

    The last one is the content of an extension that servers don't know.
    """
    _, _, second = hellos()
    message = second.removeprefix(CHANGE_CIPHER)[5:].replace(GOOD.encode(), EVIL.encode())
    inner = built_hello(server_name(GOOD.encode()))[5:]
    extension = UNKNOWN_EXTENSION.to_bytes(2) + len(inner).to_bytes(2)
    more = len(extension) + len(inner)
    at = 4 + 2 + 32
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2])
    at += 1 + message[at]
    size = int.from_bytes(message[at : at + 2])
    assert at + 2 + size == len(message)
    longer = b"\x01" + (len(message) - 4 + more).to_bytes(3) + message[4:at] + (size + more).to_bytes(2)
    return record(longer + message[at + 2 :] + extension), record(inner)


@contextmanager
def web_of_two_names() -> Generator[tuple[int, list[str | None], ssl.SSLContext]]:
    """Serve TLS of another group on loopback; yield the port, the names that were asked for, a client's context."""
    server, trusting = certified(GOOD)
    server.set_ecdh_curve(OTHER_GROUP)
    names: list[str | None] = []
    server.sni_callback = lambda _, name, __: names.append(name)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(WAIT_SECONDS)
            with connection, suppress(OSError), server.wrap_socket(connection, server_side=True) as talk:
                talk.recv(65_536)
                talk.sendall(OK)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], names, trusting
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def said_after(path: str, port: int, first: bytes, then: bytes) -> bytes:
    """Open a tunnel, send `first` at once and `then` when something has come; return all that came."""
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(connect(f"{GOOD}:{port}"))
            await reader.readuntil(b"\r\n\r\n")
            writer.write(first)
            got = await reader.read(65_536)
            writer.write(then)
            writer.write_eof()
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    got += data
            return got
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def test_a_hello_begun_before_the_server_asked_for_it_is_no_way_to_another_name() -> None:
    first, _, _ = hellos()
    begun, rest = hidden_hello()
    with web_of_two_names() as (port, names, _):
        async with proxying([f"{GOOD}=127.0.0.1:{port}"]) as it:
            got = await said_after(it.path, port, first + begun, rest)
    assert EVIL not in names and got.endswith(ALERT)
    assert it.reasons() == [("refused", "server_name")]


def test_the_process_lets_no_hello_begin_unseen(tmp_path: Path) -> None:
    first, _, _ = hellos()
    begun, rest = hidden_hello()
    with web_of_two_names() as (port, names, _), socket.socket(socket.AF_UNIX) as listener, process() as it:
        listener.bind(str(tmp_path / "p"))
        listener.listen()
        assert it.told()["ready"] is True
        policy = [f"{GOOD}=127.0.0.1:{port}"]
        it.tell({"op": "add", "id": "sbx-1", "n": 1, "policy": policy, "limits": {}}, listener)
        assert it.told() == {"serves": "sbx-1", "n": 1}
        got = asyncio.run(said_after(str(tmp_path / "p"), port, first + begun, rest))
        assert it.told()["reason"] == "server_name"
    assert got.endswith(ALERT) and names == [GOOD]


async def test_a_real_client_that_is_asked_for_a_second_hello_gets_through() -> None:
    with web_of_two_names() as (port, names, trusting):
        async with proxying([f"{GOOD}=127.0.0.1:{port}"]) as it:
            async with asyncio.timeout(WAIT_SECONDS):
                reader, writer = await asyncio.open_unix_connection(it.path)
                writer.write(connect(f"{GOOD}:{port}"))
                await reader.readuntil(b"\r\n\r\n")
                await writer.start_tls(trusting, server_hostname=GOOD)
                writer.write(get("http://x/"))
                assert await reader.read(65_536) == OK
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    assert set(names) == {GOOD}
    assert it.reasons() == [("allowed", "policy")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a directory with a key and a certificate, and with something to send early."""
    made = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={GOOD} -keyout key -out cert"
    )
    subprocess.run(made.split(), cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "early").write_bytes(b"early data\n")
    return tmp_path


@asynccontextmanager
async def early_server(folder: Path, *groups: str) -> AsyncGenerator[int]:
    """Run OpenSSL's own server, which takes early data."""
    command = "openssl s_server -accept 127.0.0.1:0 -key key -cert cert -early_data".split()
    server = await asyncio.create_subprocess_exec(
        *command, *groups, cwd=folder, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not (line := await server.stdout.readline()).startswith(b"ACCEPT "):
                assert line
        yield int(line.rpartition(b":")[2])
    finally:
        server.kill()
        await server.communicate()


async def spoken(folder: Path, at: int, port: int, until: bytes, *more: str) -> bytes:
    """Let OpenSSL's own client speak to a server through a proxy until it has said `until`; return all it said."""
    command = f"stdbuf -oL openssl s_client -proxy 127.0.0.1:{at} -connect {GOOD}:{port} -servername {GOOD}".split()
    client = await asyncio.create_subprocess_exec(
        *command,
        *more,
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert client.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while until not in said:
                line = await client.stdout.readline()
                assert line, said
                said += line
            return said + (await client.communicate(b"Q\n"))[0]
    finally:
        if client.returncode is None:
            client.kill()
            await client.communicate()


@needs_openssl
@needs_stdbuf
@pytest.mark.parametrize(
    ("groups", "became"), [((), b"Early data was accepted"), (("-groups", "P-384"), b"Early data was rejected")]
)
async def test_early_data_goes_out_when_the_server_has_answered(
    groups: tuple[str, ...], became: bytes, folder: Path
) -> None:
    async with early_server(folder, *groups) as port, proxying([f"{GOOD}=127.0.0.1:{port}"]) as it:
        async with forwarding(it.path, port=0) as at:
            await spoken(folder, at, port, b"New Session Ticket arrived", "-sess_out", "session")
            said = await spoken(folder, at, port, b"Early data was", "-sess_in", "session", "-early_data", "early")
    assert became in said
    assert it.reasons() == [("allowed", "policy")] * 2


HELLO = built_hello(server_name(GOOD.encode()))
EARLY_HELLO = built_hello(server_name(GOOD.encode()), (42, b""))


@pytest.mark.parametrize("behind", [b"\x16", HELLO[:3], HELLO, CHANGE_CIPHER, EARLY_DATA])
def test_bytes_behind_a_hello_are_not_read_over(behind: bytes) -> None:
    with pytest.raises(Refusal):
        read_hello(HELLO + behind)


@pytest.mark.parametrize(
    ("first", "between", "passes"),
    [
        (HELLO, b"", True),
        (HELLO, CHANGE_CIPHER, True),
        (HELLO, EARLY_DATA, False),
        (EARLY_HELLO, EARLY_DATA, True),
        (EARLY_HELLO, CHANGE_CIPHER + EARLY_DATA * 3, True),
        (EARLY_HELLO, EARLY_DATA * 16, False),
        (EARLY_HELLO, b"\x15\x03\x03\0\x02\x01\0", False),
    ],
)
def test_what_a_client_says_between_two_hellos_is_known(first: bytes, between: bytes, passes: bool) -> None:
    before = read_hello(first)
    assert before is not None
    if passes:
        second = read_hello(between + HELLO, before)
        assert second is not None
        check_hello(second, GOOD)
        return
    with pytest.raises(Refusal):
        read_hello(between + HELLO, before)


@pytest.mark.parametrize("before", [CHANGE_CIPHER, EARLY_DATA])
def test_nothing_comes_before_a_first_hello(before: bytes) -> None:
    with pytest.raises(Refusal):
        read_hello(before + HELLO)


def as_it_is(answer: bytes) -> bytes:
    return answer


def after_a_warning(answer: bytes) -> bytes:
    return b"\x15\x03\x03\0\x02\x01\x70" + answer


def in_records(step: int) -> Callable[[bytes], bytes]:
    def spread(answer: bytes) -> bytes:
        message = answer[5 : 5 + int.from_bytes(answer[3:5])]
        return b"".join(record(message[at : at + step]) for at in range(0, len(message), step))

    return spread


@pytest.mark.parametrize("told", [as_it_is, in_records(10), in_records(40), after_a_warning])
def test_a_server_asks_again_in_however_many_records(told: Callable[[bytes], bytes]) -> None:
    answer = told(hellos()[1])
    assert asks_again(answer) is True
    known = [asks_again(answer[:cut]) for cut in range(len(answer))]
    assert known == sorted(known, key=bool) and set(known) == {None, True}


def test_a_server_that_refuses_does_not_ask_again() -> None:
    assert asks_again(b"\x15\x03\x03\0\x02\x02\x28") is False
    assert asks_again(b"\x17\x03\x03") is False
    assert asks_again(b"\x15\x03\x03\xff\xff\x01") is False
    with pytest.raises(Refusal):
        asks_again(b"\x15\x03\x03\0\x02\x01\x70" * 16)
