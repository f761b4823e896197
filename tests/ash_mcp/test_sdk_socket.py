"""The SDK over real sockets: what a transport in memory cannot show."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import anyio.to_thread
import pytest

from ash_mcp import ConnectFailed, Hive, StreamBroken, sync

pytestmark = pytest.mark.anyio


def _event_stream(body: bytes) -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nash-origin: hub\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return head + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


def _answer(number: int) -> bytes:
    result = '{"structuredContent":{"sandboxes":[]},"content":[]}'
    return _event_stream(f'data: {{"jsonrpc":"2.0","id":{number},"result":{result}}}\n\n'.encode())


class TinyServer:
    """Answers each request with the next of the given bytes, then closes; counts connections."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.connections = 0
        self.requests = 0
        self.gone = threading.Event()
        """Set when a caller has gone away instead of waiting for an answer."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/mcp"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            with peer:
                self._talk(peer)

    def _talk(self, peer: socket.socket) -> None:
        peer.settimeout(10)
        while self._read_request(peer):
            self.requests += 1
            if not self.answers:
                if peer.recv(1) == b"":
                    self.gone.set()
                return
            answer = self.answers.pop(0)
            peer.sendall(answer)
            if not answer.endswith(b"0\r\n\r\n"):
                return

    @staticmethod
    def _read_request(peer: socket.socket) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = peer.recv(65_536)
            if not piece:
                return False
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += peer.recv(65_536)
        return True


@pytest.fixture
def serve() -> Iterator[Callable[[list[bytes]], TinyServer]]:
    servers: list[TinyServer] = []

    def start(answers: list[bytes]) -> TinyServer:
        servers.append(TinyServer(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
async def nobody() -> AsyncIterator[str]:
    """A URL where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    yield f"http://127.0.0.1:{port}/mcp"


async def test_connection_is_used_again_after_a_stream(serve: Callable[[list[bytes]], TinyServer]):
    server = serve([_answer(number) for number in (1, 2, 3)])
    async with Hive(server.url) as hive:
        for _ in range(3):
            assert await hive.list() == []
    assert (server.connections, server.requests) == (1, 3)


async def test_cancelling_a_call_hangs_up(serve: Callable[[list[bytes]], TinyServer]):
    server = serve([])
    async with Hive(server.url) as hive:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(hive.list)
                while not server.requests:
                    await anyio.sleep(0.01)
                group.cancel_scope.cancel()
        assert await anyio.to_thread.run_sync(server.gone.wait, 60)


async def test_stream_cut_by_a_dying_hive_is_broken_and_not_repeated_unless_that_is_safe(
    serve: Callable[[list[bytes]], TinyServer],
):
    server = serve([_answer(1)[:-20], _answer(2)])
    async with Hive(server.url) as hive:
        assert await hive.list() == []
        assert server.requests == 2
    server = serve([_answer(number)[:-20] for number in (1, 2, 3, 4)])
    async with Hive(server.url) as hive:
        with pytest.raises(StreamBroken):
            await hive.list()
    assert server.requests == 4


async def test_port_where_nothing_listens_is_said_soon(nobody: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    async with Hive(nobody) as hive:
        with anyio.fail_after(5), pytest.raises(ConnectFailed, match="ash up"):
            await hive.list()


async def test_sync_twin_speaks_over_sockets_too(serve: Callable[[list[bytes]], TinyServer]):
    def walk() -> None:
        with sync.Hive(serve([_answer(1)]).url) as hive:
            assert hive.list() == []

    await anyio.to_thread.run_sync(walk)
