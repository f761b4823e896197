"""Three hives that are one: a Redis, a keeper, and nginx before them, which sends each request to the next hive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

HERE = Path(__file__).parent
START_SECONDS = 60.0
STOP_SECONDS = 30.0
NGINX = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx.error;
worker_processes 1;
events {{ worker_connections 4096; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    # which hive had which call, for the storm
    log_format calls '$http_x_call_id $upstream_addr $status';
    access_log {folder}/calls calls;

    upstream hives {{
{servers}
    }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 8m;
        location / {{
            proxy_pass http://hives;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            # answers are streams
            proxy_buffering off;
            proxy_read_timeout 1h;
            # A hive that refuses the connection got nothing: the next one is asked. What was sent is not sent twice.
            proxy_next_upstream error;
            proxy_connect_timeout 2s;
            error_page 502 504 = @lost;
        }}
        location @lost {{
            default_type application/json;
            return 502 '{lost}';
        }}
    }}
}}
"""


LOST = {
    "kind": "stream_broken",
    "message": "the hive that had the request is gone; whether it did its work is unknown",
    "retryable": False,
    "trainable": False,
}
"""What nginx says for a hive that broke off, in the words that callers of hives know."""


class Missing(Exception):
    """A program that this needs is not installed."""


@dataclass
class Replica:
    """One hive, which may be killed and started again at the same port."""

    port: int
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    killed_at: list[float] = field(default_factory=list[float])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                (sys.executable, "-m", "ash_mcp.cli", "up", "--port", str(self.port)),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"a hive did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        self.killed_at.append(time.time())
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


@dataclass
class Cluster:
    """What runs."""

    url: str
    replicas: Sequence[Replica]
    call_log: Path


@contextmanager
def running(count: int = 3) -> Generator[Cluster]:
    """Start all of it and end it again; nothing is left.

    Raises:
        Missing: redis-server or nginx is not installed.
    """
    redis_server, nginx = _program("redis-server"), _program("nginx")
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # the path of a socket must be short
    redis_port, nginx_port, *ports = _free_ports(2 + count)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ASH_HUB_")},
        "ASH_HUB_REDIS_URL": f"redis://127.0.0.1:{redis_port}",
        "ASH_HUB_STATE_DIR": str(folder / "state"),
        "ASH_HUB_RUN_DIR": str(folder / "run"),
        "ASH_HUB_RECIPE_DIRS": f'["{HERE / "recipes"}"]',
    }
    replicas = [Replica(port, environment, folder / f"hive-{port}.log") for port in ports]
    (folder / "nginx.conf").write_text(_nginx_conf(folder, nginx_port, ports))
    commands = [
        (redis_server, "--port", str(redis_port), "--save", "", "--dir", str(folder), "--bind", "127.0.0.1"),
        (nginx, "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.error"), "-p", str(folder)),
    ]
    with (folder / "programs.log").open("ab") as log:
        programs = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait()
        yield Cluster(f"http://127.0.0.1:{nginx_port}/mcp", replicas, folder / "calls")
    finally:
        _end([*(replica.process for replica in replicas if replica.process is not None)])
        _end(programs)
        shutil.rmtree(folder)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _nginx_conf(folder: Path, port: int, ports: Sequence[int]) -> str:
    servers = "\n".join(f"        server 127.0.0.1:{each} max_fails=0;" for each in ports)
    # The hives ask the kernel who connects, so nginx must be the user who runs them.
    user = "user root;" if os.geteuid() == 0 else ""
    lost = json.dumps({"error": LOST})
    return NGINX.format(folder=folder, port=port, servers=servers, user=user, lost=lost)


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        package = {"nginx": "nginx-light"}.get(name, name)
        raise Missing(f"{name} is not installed; on Debian and Ubuntu: apt-get install {package}")
    return found


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
