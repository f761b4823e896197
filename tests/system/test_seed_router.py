"""`ash router --seed-routes` in the place of the seed's gateway, beside a plain HTTP server that plays a sandbox."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from pydantic import SecretStr

from ash_hub.app import Hive, open_hive
from ash_hub.seed_router import open_seed_router
from ash_hub.settings import HubSettings
from tests.hive_process import ASH
from tests.redis_server import RedisServer, running_redis

pytestmark = [pytest.mark.redis, pytest.mark.heavy]

UUID: Final = "trainer-0b6a1c9e-3d52-4c27-9a53-5a5f5ad1e0b1"
SLOW_SECONDS: Final = "1"


class Sandbox(BaseHTTPRequestHandler):
    """Echoes a message; streams two events, the second when it is told to; is silent at `/mcp/slow`."""

    go_on = threading.Event()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/mcp/slow":
            self.rfile.read()  # until the router hangs up
            return
        self.send_response(200)
        self.send_header("content-type", "application/json")
        for name in ("authorization", "x-session-id", "x-forwarded-for", "x-forwarded-host"):
            self.send_header(f"saw-{name}", self.headers[name] or "")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: one\n\n")
        if self.go_on.wait(20):
            self.wfile.write(b"data: two\n\n")

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[int]:
    Sandbox.go_on.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Sandbox) as playing:
        thread = threading.Thread(target=playing.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield playing.server_port
        Sandbox.go_on.set()
        playing.shutdown()
        thread.join()


def as_the_seed_writes(server: RedisServer, uuid: str, host: str, port: int) -> None:
    server.ask("HSET", f"sandbox:{uuid}", "uuid", uuid, "host", host, "port", port, "status", "ready")


@contextmanager
def router(server: RedisServer, folder: Path) -> Generator[str]:
    """Give the address of a router in a process of its own, which has no key of any hive."""
    folders = {"ASH_HUB_STATE_DIR": str(folder / "router"), "ASH_HUB_RUN_DIR": str(folder / "router-run")}
    environ = {**os.environ, **folders, "ASH_HUB_SEED__ANSWER_SECONDS": SLOW_SECONDS}
    command = (*ASH, "router", "--seed-routes", "--port", "0", "--redis-url", server.url)
    log = folder / "router-output"
    with log.open("wb") as output, subprocess.Popen(command, env=environ, stdout=output, stderr=output) as process:
        try:
            yield _address_in(log, process)
        finally:
            process.terminate()
            process.wait(20)


def _address_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while (said := re.search(r"routes at (http://[^/]+)/mcp", log.read_text())) is None:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return said[1]


@pytest.fixture
def unserved() -> Iterator[socket.socket]:
    with socket.socket() as unserved:
        yield unserved


def test_it_serves_what_the_seeds_control_plane_wrote_as_its_gateway_did(
    server: RedisServer, sandbox: int, unserved: socket.socket, tmp_path: Path
) -> None:
    as_the_seed_writes(server, UUID, "localhost", sandbox)
    unserved.bind(("127.0.0.1", 0))  # and nobody listens
    as_the_seed_writes(server, "dead", "127.0.0.1", unserved.getsockname()[1])
    named = {"x-session-id": UUID, "authorization": "Bearer its-own", "x-forwarded-for": "192.0.2.7"}
    with router(server, tmp_path) as address, httpx.Client(base_url=address, timeout=30) as client:
        assert (client.get("/healthz").text, client.get("/readyz").text) == ("ok", "ready")

        passed = client.post("/mcp", headers=named, content=b'{"a": 1}')
        assert (passed.status_code, passed.text) == (200, '{"a": 1}')
        saw = {name: passed.headers[f"saw-{name}"] for name in ("authorization", "x-session-id", "x-forwarded-for")}
        assert saw == {**named, "x-forwarded-for": "192.0.2.7, 127.0.0.1"}
        assert passed.headers["saw-x-forwarded-host"] == address.removeprefix("http://")

        with client.stream("GET", "/mcp", headers=named) as stream:
            events = stream.iter_raw()
            assert next(events) == b"data: one\n\n"
            Sandbox.go_on.set()
            assert next(events) == b"data: two\n\n"

        answers = [
            client.post("/mcp", content=b"{}"),
            client.post("/mcp", headers={"x-session-id": "nobody"}, content=b"{}"),
            client.post("/mcp", headers={"x-session-id": "dead"}, content=b"{}"),
            client.post("/slow", headers=named, content=b"{}"),
        ]
        assert [(answer.status_code, answer.text) for answer in answers] == [
            (400, "missing session header\n"),
            (404, "route not found\n"),
            (502, "bad gateway\n"),
            (504, "gateway timeout\n"),
        ]
        server.ask("DEL", f"sandbox:{UUID}")
        assert client.post("/mcp", headers=named, content=b"{}").status_code == 404


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


def settings(folder: Path, server: RedisServer, name: str) -> HubSettings:
    images: Any = {"images": {"timemagic/rl-mcp:general-*": "echo"}}
    redis = SecretStr(server.url)
    return HubSettings(port=0, state_dir=folder / name, run_dir=folder / f"{name}r", redis_url=redis, seed=images)


@pytest.fixture
async def hive(server: RedisServer, folder: Path) -> AsyncGenerator[Hive]:
    async with open_hive(settings(folder, server, "h")) as hive:
        yield hive


@pytest.fixture
async def beside(server: RedisServer, folder: Path, hive: Hive) -> AsyncGenerator[str]:
    """Give the address of a router that runs as the hive's user, whom a loopback hive lets in without a key."""
    async with open_seed_router(settings(folder, server, "q")) as router:
        yield router.url.removesuffix("/mcp")


@pytest.mark.anyio
async def test_nothing_of_a_hive_on_the_same_redis_is_reached_through_it(
    server: RedisServer, hive: Hive, beside: str
) -> None:
    base = hive.url.removesuffix("/mcp")
    as_the_seed_writes(server, "sly", "127.0.0.1", int(base.rpartition(":")[2]))
    async with httpx.AsyncClient(timeout=60) as http:
        made = await http.post(f"{base}/spawn", json={"image": "timemagic/rl-mcp:general-1.7"})
        uuid = made.json()["uuid"]
        for name in (uuid, "sly"):  # the hive's own hash, and another that leads to it
            for path in ("/mcp", "/", "/mcp/%2e%2e/spawn", "/healthz/x", "/s/sb1/mcp"):
                answer = await http.post(beside + path, headers={"x-session-id": name}, json={})
                assert (answer.status_code, "route not found" in answer.text) == (404, True), path
        for name in ("sb1", "sbx-nobody"):
            answer = await http.post(f"{beside}/mcp", headers={"x-session-id": name}, json={})
            assert (answer.status_code, answer.text) == (404, "route not found\n")
        for path in (
            "/mcp",
            "/s/sb1/mcp",
            f"/s/{uuid}/mcp",
            "/spawn",
            "/metrics",
            "/deprovision-all",
            "/openapi.json",
        ):
            answer = await http.post(beside + path, json={})
            assert (answer.status_code, answer.text) == (400, "missing session header\n")
