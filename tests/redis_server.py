"""A real redis-server on this machine that tests may stop, restart and flush."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

BINARY = shutil.which(os.environ.get("ASH_TEST_REDIS", "redis-server")) or shutil.which("valkey-server")
"""`ASH_TEST_REDIS` names another, such as valkey-server."""
_START_SECONDS = 10.0


class RedisServer:
    """Listens on a free loopback port; keeps its port and its folder over restarts."""

    def __init__(self, folder: Path, *options: str, password: str | None = None, tls: bool = False) -> None:
        self.folder = folder
        self.port = _free_port()
        self.password = password
        self._options = list(options)
        self._asking: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "password": password}
        if password is not None:
            self._options += ["--requirepass", password]
        if tls:
            self._asking |= {"ssl": True, "ssl_cert_reqs": "none", "ssl_check_hostname": False}
        self._ports = ["--port", "0", "--tls-port", str(self.port)] if tls else ["--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and return when it answers."""
        assert BINARY is not None
        command = [BINARY, "--bind", "127.0.0.1", "--dir", str(self.folder), "--logfile", "redis.log"]
        self._process = subprocess.Popen([*command, *self._ports, *self._options], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.ask("PING")
                return
            except redis.RedisError:
                assert self._process.poll() is None, (self.folder / "redis.log").read_text()
                assert time.monotonic() < deadline, "redis-server does not answer"
                time.sleep(0.02)

    def stop(self) -> None:
        """End it as an operator would; what it was told to save it saves."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it answer nothing until `resume`, while connections to it stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            os.kill(self._process.pid, how)
            self._process.wait(_START_SECONDS)
            self._process = None

    def ask(self, *command: str | int) -> Any:
        """Return the answer to one command, on a connection of its own."""
        with redis.Redis(**self._asking, decode_responses=True, socket_timeout=5.0) as client:
            return cast("Any", client).execute_command(*command)


@contextlib.contextmanager
def running_redis(
    folder: Path, *options: str, password: str | None = None, tls: bool = False
) -> Generator[RedisServer]:
    """Run a server while the context is open; without the binary the test is skipped."""
    if BINARY is None:
        pytest.skip("there is no redis-server on the PATH")
    server = RedisServer(folder, "--save", "", *options, password=password, tls=tls)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
