"""Connections to ports inside a sandbox: taken over by the runner, and then nobody's but the two sides'."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.asyncio.client import unix_connect
from websockets.exceptions import InvalidStatus

from ash_recipes.runner.ports import port_door
from tests.recipes.runner_parts import ECHO, Runner, running

SECONDS: Final = 10.0
_TOLD: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


WITHOUT_HTTPTOOLS: Final = (
    "import runpy, sys; sys.modules['httptools'] = None; runpy.run_module('ash_recipes.runner', run_name='__main__')"
)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def runner(request: pytest.FixtureRequest) -> Generator[Runner]:
    """A runner with either of the parsers that it may find in its image."""
    start = ("-m", "ash_recipes.runner") if request.param == "httptools" else ("-c", WITHOUT_HTTPTOOLS)
    with running(ECHO, launcher=(sys.executable, *start)) as made:
        yield made


@contextmanager
def listening(host: str = "127.0.0.1") -> Generator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen()
        listener.settimeout(SECONDS)
        yield listener


def asked(runner: Runner, port: object, *, token: str | None = None) -> socket.socket:
    hive = socket.socket(socket.AF_UNIX)
    hive.settimeout(SECONDS)
    assert runner.path is not None
    hive.connect(runner.path)
    head = f"GET /_ash/ports/{port} HTTP/1.1\r\nhost: sandbox\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    hive.sendall(f"{head}ash-token: {runner.token() if token is None else token}\r\n\r\n".encode())
    return hive


def all_of(side: socket.socket) -> bytes:
    whole = bytearray()
    while piece := side.recv(2**20):
        whole += piece
    return bytes(whole)


def refused(runner: Runner, port: object, *, token: str | None = None) -> tuple[int, str, str]:
    """Return the status, kind and words of a refusal, after which the connection is closed."""
    with closing(asked(runner, port, token=token)) as hive:
        head, _, body = all_of(hive).partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    return int(head.split(b" ")[1]), error["kind"], error["message"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bytes_pass_both_ways_as_they_come_and_the_end_of_one_side_is_that_of_the_other(
    runner: Runner, host: str
) -> None:
    with listening(host) as listener, closing(asked(runner, listener.getsockname()[1])) as hive:
        server, _ = listener.accept()
        with server:
            server.settimeout(SECONDS)
            server.sendall(b"\x00greeting")  # some servers speak first
            assert hive.recv(len(_TOLD), socket.MSG_WAITALL) == _TOLD
            assert hive.recv(9, socket.MSG_WAITALL) == b"\x00greeting"
            hive.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert server.recv(18, socket.MSG_WAITALL) == b"GET / HTTP/1.1\r\n\r\n"
            server.sendall(b"last")
        assert all_of(hive) == b"last"


def test_a_server_hears_that_the_hive_has_gone(runner: Runner) -> None:
    with listening() as listener, closing(asked(runner, listener.getsockname()[1])) as hive:
        server, _ = listener.accept()
        with server:
            server.settimeout(SECONDS)
            assert hive.recv(len(_TOLD), socket.MSG_WAITALL) == _TOLD
            hive.close()
            assert all_of(server) == b""


def test_a_side_that_does_not_read_stops_the_other(runner: Runner) -> None:
    """A server sends 16 MiB; until the hive reads, no more of it is on the way than sockets and one buffer hold."""
    size, sent = 16 * 2**20, threading.Event()

    def send(listener: socket.socket) -> None:
        server, _ = listener.accept()
        with server:
            server.sendall(bytes(size))
        sent.set()

    with listening() as listener:
        thread = threading.Thread(target=send, args=(listener,))
        thread.start()
        with closing(asked(runner, listener.getsockname()[1])) as hive:
            assert hive.recv(len(_TOLD), socket.MSG_WAITALL) == _TOLD
            assert not sent.wait(0.5)
            assert len(all_of(hive)) == size
        thread.join(SECONDS)


def test_a_port_where_nobody_listens_is_said_to_be_closed(runner: Runner) -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
    status, kind, words = refused(runner, port)
    assert (status, kind) == (502, "port_closed")
    assert f"nobody listens on port {port}" in words


def test_nobody_gets_to_a_port_without_a_token_of_this_sandbox(runner: Runner) -> None:
    with listening() as listener:
        port = listener.getsockname()[1]
        for token in ("", "x", runner.token(aud="another"), runner.token(exp=0)):
            assert refused(runner, port, token=token)[:2] == (401, "unauthenticated")
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("port", ["0", "65536", "080", "-1", "80/", "80?x", "80/../81", "", "x", "80%20"])
def test_what_is_no_port_is_not_found(runner: Runner, port: str) -> None:
    assert refused(runner, port)[:2] == (404, "not_found")


def test_a_request_that_does_not_ask_for_the_connection_is_not_found(runner: Runner) -> None:
    with listening() as listener, runner.http() as http:
        assert http.get(f"/_ash/ports/{listener.getsockname()[1]}").status_code == 404


async def echoing(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": f"{scope['path']} {message['text']}"})


@pytest.mark.anyio
@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_websockets_that_are_for_no_port_are_served_as_such(http: Any, tmp_path: Path) -> None:
    ws: Any = port_door(lambda _: False, WebSocketsSansIOProtocol)
    settings = uvicorn.Config(echoing, uds=str(tmp_path / "s"), ws=ws, http=http, lifespan="off", log_config=None)
    server = uvicorn.Server(settings)
    serving = asyncio.create_task(server.serve())
    try:
        with anyio.fail_after(SECONDS):
            while not server.started:
                await anyio.sleep(0.01)
        async with unix_connect(str(tmp_path / "s"), "ws://x/else") as first:
            for word in ("one", "x" * 100_000):
                await first.send(word)
                assert await first.recv() == f"/else {word}"
        with pytest.raises(InvalidStatus, match="401"):
            await unix_connect(str(tmp_path / "s"), "ws://x/_ash/ports/80")
    finally:
        server.should_exit = True
        await serving
