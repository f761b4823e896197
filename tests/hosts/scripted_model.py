"""A model that plays a script, on loopback, in whichever API a host asks it; it keeps what each request offered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

from tests.hosts.model_apis import APIS, Api, Move, Request

__all__ = ["Script", "ScriptedModel", "scripted_model"]

Script = Callable[[Request], Move]
_THINKING_SECONDS: Final = 0.5
"""No real model answers sooner, and hosts fetch a changed list meanwhile."""
_MOST_REQUESTS: Final = 20
_SIDE_ANSWER: Final = Move(text='{"title": "a visit", "complexity_score": 50, "complexity_reasoning": "none"}')
"""For requests without tools, in which hosts ask for a title or for which model to take."""


@dataclass(slots=True, kw_only=True)
class ScriptedModel:
    """What a host is pointed at, and what it asked there."""

    script: Script
    port: int = 0
    requests: list[Request] = field(default_factory=list[Request])
    """Those that offered tools, each with all results so far."""
    refused: list[str] = field(default_factory=list[str])
    """Requests of no API: some hosts try more than they need, and this is their proxy as well."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def move(self, request: Request) -> Move:
        if not request.tools:
            return _SIDE_ANSWER
        self.requests.append(request)
        return self.script(request) if len(self.requests) <= _MOST_REQUESTS else Move(text="This leads nowhere.")

    def looked_for_outside(self) -> Sequence[str]:
        """Return what a host looked for that is not here; it was refused."""
        return [asked for asked in self.refused if not asked.split()[1].startswith("/")]


@contextmanager
def scripted_model(script: Script) -> Generator[ScriptedModel]:
    """Serve a script while the context is open."""
    model = ScriptedModel(script=script)
    handler = type("Handler", (_Handler,), {"model": model})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        model.port = server.server_port
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield model
        finally:
            server.shutdown()
            serving.join()


class _Handler(BaseHTTPRequestHandler):
    model: ScriptedModel

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        path = urlsplit(self.path).path
        api = next((api for api in APIS if api.path.search(path)), None)
        if api is None or not self.path.startswith("/"):
            self._refuse()
            return
        asked: dict[str, Any] = json.loads(body)
        move = self.model.move(api.read(asked))
        time.sleep(_THINKING_SECONDS)
        if asked.get("stream") or ":stream" in path:
            self._stream(api, move)
        else:
            self._answer(200, api.whole(move))

    def _refuse(self) -> None:
        self.model.refused.append(f"{self.command} {self.path}")
        self._answer(404, {"error": {"message": "nothing here", "type": "not_found"}})

    do_GET = do_HEAD = do_PUT = do_CONNECT = _refuse

    def _stream(self, api: Api, move: Move) -> None:
        self._head(200, "text/event-stream")
        for kind, data in api.events(move):
            named = f"event: {kind}\n" if kind else ""
            self.wfile.write(f"{named}data: {json.dumps(data)}\n\n".encode())
        self.wfile.write(api.last_line.encode())

    def _answer(self, status: int, body: Mapping[str, Any]) -> None:
        self._head(status, "application/json")
        self.wfile.write(json.dumps(body).encode())

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what a host did is in the model's turns."""
