"""The egress proxy by itself, as a pod starts it: a configuration in, decisions to standard output."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ash_hub
from tests.hub.egress.egress_parts import WAIT_SECONDS, error_of, get

ENVIRONMENT = {"PATH": os.defpath, "PYTHONPATH": str(Path(ash_hub.__file__).parents[1])}
COMMAND = (sys.executable, "-S", "-m", "ash_hub.egress")


def configured(place: Path, *sandboxes: Mapping[str, Any], **more: Any) -> str:
    path = place / "egress.json"
    path.write_text(json.dumps({"sandboxes": sandboxes, **more}))
    return str(path)


@contextmanager
def running(config: str) -> Generator[subprocess.Popen[bytes]]:
    """Run the proxy; it must end in order when it is told to."""
    with subprocess.Popen([*COMMAND, config], stdout=subprocess.PIPE, env=ENVIRONMENT) as child:
        try:
            yield child
            child.send_signal(signal.SIGTERM)
            assert child.wait(WAIT_SECONDS) == 0
        finally:
            child.kill()


def line_of(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert child.stdout is not None
    return json.loads(child.stdout.readline())


def asked(address: str | tuple[str, int], request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(WAIT_SECONDS)
        client.connect(address)
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as file:
            return file.read()


def refusal(config: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, config], capture_output=True, text=True, timeout=WAIT_SECONDS, env=ENVIRONMENT)
    return done.returncode, done.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_each_sandbox_has_its_listener_and_its_policy_and_decisions_are_lines(tmp_path: Path) -> None:
    port, own, path = free_port(), free_port(), str(tmp_path / "p")
    config = configured(
        tmp_path,
        {"id": "sbx-1", "listen": path, "policy": ["example.com"]},
        {"id": "sbx-2", "listen": f"127.0.0.1:{port}", "policy": [f"127.0.0.1:{own}"], "limits": {"connections": 3}},
        own_ports=[own],
    )
    with running(config) as child:
        assert child.stdout is not None
        assert line_of(child) == {"ready": True, "user": 65534 if os.geteuid() == 0 else os.geteuid()}
        assert error_of(asked(path, get("http://other.test/")))["reason"] == "not_listed"
        assert error_of(asked(("127.0.0.1", port), get(f"http://127.0.0.1:{own}/")))["reason"] == "hive"
        told = [line_of(child), line_of(child)]
    assert [(it["event"], it["sandbox"], it["reason"]) for it in told] == [
        ("egress", "sbx-1", "not_listed"),
        ("egress", "sbx-2", "hive"),
    ]


def test_a_socket_that_another_one_left_is_made_anew(tmp_path: Path) -> None:
    path = str(tmp_path / "p")
    config = configured(tmp_path, {"id": "sbx-1", "listen": path, "policy": "none"})
    for _ in range(2):
        with running(config) as child:
            line_of(child)
            assert error_of(asked(path, get("http://other.test/")))["reason"] == "no_network"


def test_a_configuration_that_is_wrong_is_said_and_nothing_starts(tmp_path: Path) -> None:
    for sandbox, said in (
        ({"id": "sbx-1", "listen": "/p", "policy": ["*.com"]}, "too wide"),
        ({"id": "sbx-1", "listen": "/p"}, "policy"),
        ({"id": "sbx-1", "listen": "nowhere", "policy": "none"}, "neither the path of a socket nor host:port"),
        ({"id": "sbx-1", "listen": "/p", "policy": "none", "limits": {"connection": 3}}, "connection"),
    ):
        code, error = refusal(configured(tmp_path, sandbox))
        assert code == 1 and error.startswith("egress proxy: ") and said in error, error
        assert "Traceback" not in error
    assert refusal(str(tmp_path / "none"))[0] == 1
