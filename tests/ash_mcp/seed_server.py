"""A stand-in for the server of the seed's REST: real HTTP on loopback, made-up sandboxes, faults on demand."""

from __future__ import annotations

import json
import threading
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

__all__ = ["BROKEN", "LOST", "STALLED", "Answer", "Asked", "SeedServer"]

_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Answer:
    """What the server is to answer instead of doing what it was asked."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


LOST: Final = "lost"
"""The server does what it is asked and closes the connection instead of answering."""
BROKEN: Final = "broken"
"""The server does nothing and closes the connection."""
STALLED: Final = "stalled"
"""The server sends a byte of its answer now and then until it is closed."""


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Any


class SeedServer:
    """Serves from its making until `close`.

    Args:
        is_hive: Whether it marks its answers as a hive's and honours `Idempotency-Key`, as the seed's did not.
    """

    def __init__(self, *, is_hive: bool = True) -> None:
        self.is_hive = is_hive
        self.faults: deque[Answer | str] = deque()
        """What befalls the next requests other than `/healthz`, in order."""
        self.asked: list[Asked] = []
        self.sandboxes: dict[str, dict[str, Any]] = {}
        self.ready = True
        self.closed = threading.Event()
        self._by_key: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.address}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def spawns(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.path == "/spawn"]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def serve(self) -> None:
                server._serve(self)  # pyright: ignore[reportPrivateUsage]

            do_GET = do_POST = do_DELETE = serve

        return Handler

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Asked(request.command, request.path, headers, json.loads(raw) if raw else None)
        with self._lock:
            self.asked.append(asked)
            fault = self.faults.popleft() if self.faults and asked.path != "/healthz" else None
            answer = fault if isinstance(fault, Answer) else None
            if answer is None and fault != BROKEN:
                answer = self._answer(asked)
        if fault == STALLED:
            self._stall(request)
        elif answer is not None and fault != LOST:
            self._send(request, answer)
        if isinstance(fault, str):
            request.close_connection = True

    def _answer(self, asked: Asked) -> Answer:
        match asked.method, asked.path.split("/")[1:]:
            case "GET", ["healthz"]:
                return Answer(200, b"ok")
            case "GET", ["readyz"]:
                return Answer(200, b"ready") if self.ready else Answer(503, b"not ready")
            case "POST", ["spawn"]:
                return _json(200, self._spawn(asked))
            case "DELETE", ["deprovision", name]:
                if self.sandboxes.pop(name, None) is None:
                    return _json(404, {"error": "UUID not found"})
                return _json(200, {"message": "Deprovisioned", "uuid": name})
            case "DELETE", ["deprovision-all"]:
                gone = list(self.sandboxes)
                self.sandboxes.clear()
                return _json(200, {"deleted": gone, "failed": [], "count": len(gone)})
            case _:
                return _json(404, {"error": "no such path"})

    def _spawn(self, asked: Asked) -> dict[str, Any]:
        key = asked.headers.get("idempotency-key") if self.is_hive else None
        if key is not None and key in self._by_key:
            return self._by_key[key]
        name = asked.body.get("name") or f"box{len(self.sandboxes)}"
        sandbox_uuid = f"{name}-{uuid.uuid4()}"
        made = {
            "name": name,
            "uuid": sandbox_uuid,
            "namespace": "apps",
            "status": "Ready",
            "service_type": "ClusterIP",
            "cluster_ip": "10.0.0.7",
            "host": f"{name}.apps.svc.cluster.local",
            "ports": [port["container_port"] for port in asked.body["ports"]],
            "message": "",
        }
        self.sandboxes[sandbox_uuid] = made
        if key is not None:
            self._by_key[key] = made
        return made

    def _send(self, request: BaseHTTPRequestHandler, answer: Answer) -> None:
        request.send_response(answer.status)
        headers = {"content-length": str(len(answer.body)), **({"ash-origin": "hub"} if self.is_hive else {})}
        for name, value in {**headers, **answer.headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(answer.body)

    def _stall(self, request: BaseHTTPRequestHandler) -> None:
        try:
            request.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
            while not self.closed.wait(_POLL_SECONDS):
                request.wfile.write(b" ")
        except OSError:
            pass  # the client has gone


def _json(status: int, body: Mapping[str, Any]) -> Answer:
    return Answer(status, json.dumps(body).encode(), {"content-type": "application/json"})
