"""A tap between a host and a hive: passes every byte on, and notes which version of MCP the two speak.

Hosts of the stateless era name it in every request, older ones agree on it at first, and not all name it after that.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Final
from urllib.parse import urlsplit

__all__ = ["Tap", "tapped"]

_NAMED: Final = re.compile(rb"(?i)\r\nmcp-protocol-version: *(\S+)\r\n")
_AGREED: Final = re.compile(rb'"protocolVersion":"([^"]+)"')
_OVERLAP_BYTES: Final = 100


@dataclass(slots=True)
class Tap:
    """Where it listens, and what it heard."""

    url: str
    versions: list[str] = field(default_factory=list[str])
    """In the order in which they were first named."""

    def hear(self, pattern: re.Pattern[bytes], data: bytes) -> None:
        for found in pattern.findall(data):
            if (version := found.decode()) not in self.versions:
                self.versions.append(version)


@contextmanager
def tapped(hive_url: str) -> Generator[Tap]:
    """Stand before the hive at `hive_url` while the context is open."""
    hive = urlsplit(hive_url)
    tap = Tap("")

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            host: socket.socket = self.request
            with socket.create_connection((hive.hostname, hive.port)) as upstream:
                back = threading.Thread(target=_copy, args=(upstream, host, partial(tap.hear, _AGREED)), daemon=True)
                back.start()
                _copy(host, upstream, partial(tap.hear, _NAMED))
                back.join()

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        tap.url = f"http://127.0.0.1:{server.server_address[1]}{hive.path}"
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield tap
        finally:
            server.shutdown()
            serving.join()


def _copy(source: socket.socket, sink: socket.socket, hear: Callable[[bytes], None]) -> None:
    last = b""
    with suppress(OSError):
        while piece := source.recv(65536):
            hear(last + piece)
            last = piece[-_OVERLAP_BYTES:]
            sink.sendall(piece)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
