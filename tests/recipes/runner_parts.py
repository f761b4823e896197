"""A real runner as a process of its own on a Unix socket, and clients of it."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import httpx2
import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

__all__ = ["ECHO", "GENERAL", "LEGACY", "Runner", "running"]

SANDBOX: Final = "sbx-test"
ECHO: Final[Mapping[str, Any]] = {"python": "ash_recipes.echo.server:server"}
GENERAL: Final[Mapping[str, Any]] = {"python": "ash_recipes.general.server:build"}
HERE: Final = Path(__file__).parent
LEGACY: Final[Mapping[str, Any]] = {"stdio": {"command": [sys.executable, str(HERE / "legacy_server.py")]}}
START_SECONDS: Final = 30.0


@dataclass
class Runner:
    process: subprocess.Popen[bytes]
    path: str | None
    """Its socket; None when it listens on a port of loopback."""
    url: str
    key: Ed25519PrivateKey
    secret: bytes
    """What it proves itself with, on a port."""
    workspace: Path
    home: Path
    log: Path

    def token(self, **claims: Any) -> str:
        """Return a good call token, but for the claims that are given."""
        good = {"iss": "ash", "aud": SANDBOX, "exp": int(time.time()) + 300}
        return jwt.encode({**good, **claims}, self.key, algorithm="EdDSA")

    def http(self, token: str | None = None) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            transport=httpx.HTTPTransport(uds=self.path, retries=20),
            headers={"ash-token": self.token() if token is None else token},
            timeout=START_SECONDS,
        )

    @asynccontextmanager
    async def client(self, mode: str, **more: Any) -> AsyncGenerator[Client]:
        """Connect the SDK's own client, by handshake (`legacy`) or without (`2026-07-28`).

        Only over a port: a request on a Unix socket that is cancelled as it is answered fails in anyio 4.16, with an
        `InvalidStateError` of the loop.
        """
        assert self.path is None
        transport = httpx2.AsyncHTTPTransport(retries=20)
        async with httpx2.AsyncClient(
            transport=transport, headers={"ash-token": self.token()}, timeout=START_SECONDS
        ) as http:
            streams = streamable_http_client(f"{self.url}/mcp", http_client=http)
            async with Client(streams, mode=mode, cache=None, **more) as client:
                yield client

    def stop(self) -> tuple[int, float]:
        """End it as a keeper does, and return its exit code and how long that took."""
        began = time.monotonic()
        self.process.terminate()
        return self.process.wait(10), time.monotonic() - began


@contextmanager
def running(
    server: Mapping[str, Any],
    env: Mapping[str, str] | None = None,
    *,
    launcher: Sequence[str] = (sys.executable, "-m", "ash_recipes.runner"),
    port: bool = False,
    host: str = "127.0.0.1",
    ready: bool = True,
    config: Mapping[str, Any] | None = None,
    key: Ed25519PrivateKey | None = None,
    secret: bytes | None = None,
    sandbox: str = SANDBOX,
) -> Generator[Runner]:
    """Start a runner that serves a recipe's server.

    Args:
        ready: Wait until it does, or has failed to.
        config: More of its configuration.
        key: The hive's; its own if there is none.
        secret: What it proves itself with, on a port.
        port: Listen on a port of `host`, an address of loopback, instead of an inherited socket.
    """
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as folder:  # a socket's path must be short
        here = Path(folder)
        workspace, home, log = here / "workspace", here / "home", here / "log"
        workspace.mkdir()
        home.mkdir()
        key = key or Ed25519PrivateKey.generate()
        raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        config = {
            **(config or {}),
            "sandbox_id": sandbox,
            "recipe": "tested",
            "public_key": base64.b64encode(raw).decode(),
            "server": server,
            "env": dict(env or {}),
            "workspace": str(workspace),
            "home": str(home),
        }
        secret = secret or os.urandom(32)
        family = (socket.AF_INET6 if ":" in host else socket.AF_INET) if port else socket.AF_UNIX
        with socket.socket(family) as listener, log.open("wb") as output:
            listener.bind((host, 0) if port else str(here / "socket"))
            path, url, inherited = str(here / "socket"), "http://runner", [listener.fileno()]
            listen = {"ASH_LISTEN_FD": str(listener.fileno())}
            if port:
                address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
                path, url, inherited = None, f"http://{address}", []
                listen = {"ASH_LISTEN": address, "ASH_SANDBOX_KEY": base64.b64encode(secret).decode()}
                listener.close()
            else:
                listener.listen(64)
            environ = {**os.environ, "PYTHONPATH": str(HERE), "ASH_RUNNER_CONFIG": json.dumps(config), **listen}
            process = subprocess.Popen(
                list(launcher),
                env=environ,
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        with process:
            try:
                runner = Runner(process, path, url, key, secret, workspace, home, log)
                if ready:
                    with runner.http() as http:
                        http.get("/_ash/health")
                yield runner
            finally:
                process.kill()
