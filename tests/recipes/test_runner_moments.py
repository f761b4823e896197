"""What a runner says and does before its recipe's server is there, and that SIGTERM ends it at every moment."""

from __future__ import annotations

import base64
import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from tests.recipes.runner_parts import ECHO, HERE, Runner, running
from tests.recipes.test_runner_http import modern_call

pytestmark = pytest.mark.heavy

T = TypeVar("T")

GATED = {"python": "gated_server:server"}
GATED_COMMAND = {"stdio": {"command": [sys.executable, str(HERE / "gated_server.py")]}}
SUBREAPER = (
    "import ctypes, os, sys;"
    "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0);"
    "os.execv(sys.executable, [sys.executable, '-m', 'ash_recipes.runner'])"
)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@contextmanager
def gated(gate: Path, **more: Any) -> Generator[Runner]:
    """A runner whose recipe is being imported, and waits for the gate."""
    with running(GATED, {"GATE": str(gate)}, ready=False, **more) as runner:
        yield runner


def wait_at(gate: Path) -> int:
    """Return an end of the gate once the recipe waits there; closing it lets the recipe go on."""
    return within(60, lambda: _opened(gate))


def _opened(gate: Path) -> int | None:
    try:
        return os.open(gate, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads yet
        return None


def within(seconds: float, look: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


@pytest.mark.parametrize("port", [False, True], ids=["unix", "tcp"])
def test_while_the_recipe_is_imported_health_says_so_and_all_else_is_retryable(gate: Path, port: bool) -> None:
    with gated(gate, port=port) as runner, runner.http() as http, runner.http("") as stranger:
        opened = wait_at(gate)
        answer = stranger.get("/_ash/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        assert stranger.post("/mcp", content=b"{}").status_code == 401
        assert stranger.post("/_ash/claim", json={}).status_code == 401
        for answer in (http.post("/mcp", content=b"x" * 100_000), http.post("/_ash/claim", json={}), http.get("/no")):
            error = answer.json()["error"]
            assert (answer.status_code, error["kind"]) == (503, "starting")
            assert (error["retryable"], error["trainable"]) == (True, False)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(http.get, "/_ash/health")
            with pytest.raises(concurrent.futures.TimeoutError):
                waiting.result(0.2)
            os.close(opened)
            ready = {"status": "ready", "sandbox_id": "sbx-test"}
            assert waiting.result(60).json() == ready
        assert stranger.get("/_ash/health").json() == {"status": "ready"}
        assert modern_call(http, "hello")["structuredContent"] == {"result": "hello"}


def test_health_without_a_token_says_nothing_of_a_failure_but_that_there_is_one() -> None:
    with running({"python": "no.such.module:server"}) as runner, runner.http() as http, runner.http("") as stranger:
        assert "No module named 'no'" in http.get("/_ash/health").json()["error"]["message"]
        answer = stranger.get("/_ash/health")
        assert (answer.status_code, answer.json()) == (500, {"status": "failed"})


def _has_handler(runner: Runner) -> bool | None:
    status = Path(f"/proc/{runner.process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return True if caught & (1 << (signal.SIGTERM - 1)) else None


@pytest.mark.parametrize("later", [0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5])
def test_sigterm_ends_it_while_it_starts(later: float) -> None:
    """The moments lie between its first line and its first answer, wherever that is on this machine."""
    with running(ECHO, ready=False) as runner:
        within(60, lambda: _has_handler(runner))
        time.sleep(later)
        code, _ = runner.stop()
        assert code == 0


@pytest.mark.parametrize("launcher", [None, [sys.executable, "-c", SUBREAPER]], ids=["alone", "below a reaper"])
def test_sigterm_ends_it_while_its_recipe_is_imported(gate: Path, launcher: list[str] | None) -> None:
    with gated(gate, **({} if launcher is None else {"launcher": launcher})) as runner:
        wait_at(gate)
        code, _ = runner.stop()
        assert code == 0


def test_sigterm_ends_it_while_its_import_waits_in_a_system_call_that_is_not_interrupted(gate: Path) -> None:
    with running(GATED, {"GATE": str(gate), "DEAF": "1"}, ready=False) as runner:
        wait_at(gate)
        time.sleep(0.3)  # from the call that opened the gate to the one that reads it
        code, _ = runner.stop()
        assert code == 0


def test_sigterm_ends_a_command_that_is_being_started(gate: Path) -> None:
    with running(GATED_COMMAND, {"GATE": str(gate)}, ready=False) as runner:
        opened = wait_at(gate)
        code, _ = runner.stop()
        assert code == 0
        with pytest.raises(BrokenPipeError):  # nobody is left to read
            os.write(opened, b"x")


def test_sigterm_ends_it_during_a_claim(gate: Path) -> None:
    with running(GATED_COMMAND, {"GATE": str(gate)}, ready=False) as runner, runner.http() as http:
        os.close(wait_at(gate))
        assert http.get("/_ash/health").status_code == 200
        with concurrent.futures.ThreadPoolExecutor() as pool:
            claiming = pool.submit(http.post, "/_ash/claim", json={"env": {"A": "1"}})
            opened = wait_at(gate)  # the server starts again
            code, _ = runner.stop()
            assert code == 0
            assert claiming.exception(5) is not None or claiming.result().status_code == 500
        with pytest.raises(BrokenPipeError):
            os.write(opened, b"x")


def test_the_same_claim_has_the_same_answer_and_another_is_refused(gate: Path) -> None:
    claim = {"env": {"A": "1"}, "secrets": {"B": "2"}}
    with (
        running(GATED_COMMAND, {"GATE": str(gate)}, ready=False) as runner,
        runner.http() as http,
        runner.http() as again,
    ):
        os.close(wait_at(gate))
        assert http.get("/_ash/health").status_code == 200
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(http.post, "/_ash/claim", json=claim)
            opened = wait_at(gate)
            second = pool.submit(again.post, "/_ash/claim", json=dict(reversed(claim.items())))
            with pytest.raises(concurrent.futures.TimeoutError):
                second.result(0.2)  # it waits for the first one's answer
            os.close(opened)
            answers = [(one.result(60).status_code, one.result().json()) for one in (first, second)]
        assert answers == [(200, {"claimed": True})] * 2
        other = http.post("/_ash/claim", json={"env": {"A": "2"}})
        assert (other.status_code, other.json()["error"]["kind"]) == (409, "conflict")
        assert http.post("/_ash/claim", json=claim).json() == {"claimed": True}


def test_on_tcp_nothing_is_served_without_keys() -> None:
    key = base64.b64encode(bytes(32)).decode()
    base = {name: value for name, value in os.environ.items() if not name.startswith("ASH_")}
    base |= {"PYTHONPATH": os.pathsep.join(sys.path), "ASH_LISTEN": "127.0.0.1:0"}
    for config, more, words in (
        ("{}", {"ASH_SANDBOX_KEY": key}, "serves only with a public_key"),
        (f'{{"public_key": "{key}"}}', {}, "and with ASH_SANDBOX_KEY"),
        (f'{{"public_key": "{key[4:]}"}}', {}, "public_key is not the base64 of 32 bytes"),
        ("{}", {"ASH_SANDBOX_KEY": "x"}, "is wrong"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ash_recipes.runner"],
            env={**base, "ASH_RUNNER_CONFIG": config, **more},
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 2 and words in done.stderr


def test_a_runner_that_is_reached_early_is_reached_by_its_port(gate: Path) -> None:
    with gated(gate, port=True, host="::1") as runner:
        opened = wait_at(gate)
        assert runner.url.startswith("http://[::1]:")
        assert httpx.get(f"{runner.url}/_ash/health").json() == {"status": "starting"}
        os.close(opened)
