"""The runner's private surface, over a real socket: who may call, health, claim, files, and the end."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.recipes.runner_parts import ECHO, LEGACY, Runner, running

MODERN = "2026-07-28"


@pytest.fixture(scope="module")
def runner() -> Generator[Runner]:
    with running(ECHO, {"OF_THE_RECIPE": "yes"}) as runner:
        yield runner


def modern_call(http: httpx.Client, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """Call a tool in the stateless era with nothing but an HTTP client, and return its result."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    answer = http.post(
        "/mcp",
        json={
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": name, "arguments": arguments or {}, "_meta": meta},
        },
        headers={
            "mcp-protocol-version": MODERN,
            "mcp-method": "tools/call",
            "mcp-name": name,
            "accept": "application/json, text/event-stream",
        },
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]


def test_health_names_the_sandbox(runner: Runner) -> None:
    with runner.http() as http:
        assert http.get("/_ash/health").json() == {"status": "ready", "sandbox_id": "sbx-test"}


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "sbx-other"},
        {"iss": "other"},
        {"exp": int(time.time()) - 60},
        {"exp": "never"},
    ],
)
def test_a_token_for_something_else_is_refused(runner: Runner, claims: dict[str, Any]) -> None:
    with runner.http() as http:
        token = runner.token(**claims) if claims.get("exp") != "never" else _without_expiry(runner)
        assert http.get("/_ash/health", headers={"ash-token": token}).json() == {"status": "ready"}
        for path in ("/_ash/files", "/mcp", "/nowhere"):
            answer = http.get(path, headers={"ash-token": token})
            assert answer.status_code == 401 and answer.json()["error"]["kind"] == "unauthenticated"


def _without_expiry(runner: Runner) -> str:
    return jwt.encode({"iss": "ash", "aud": "sbx-test"}, runner.key, algorithm="EdDSA")


def test_a_token_of_another_key_or_of_none_is_refused(runner: Runner) -> None:
    claims = {"iss": "ash", "aud": "sbx-test", "exp": int(time.time()) + 60}
    for token in (
        "",
        "nonsense",
        jwt.encode(claims, Ed25519PrivateKey.generate(), algorithm="EdDSA"),
        jwt.encode(claims, "", algorithm="none"),
        jwt.encode(claims, "x" * 32, algorithm="HS256"),
    ):
        with runner.http(token) as http:
            assert http.get("/_ash/files").status_code == 401
    with runner.http() as http:
        doubled = [("ash-token", runner.token()), ("ash-token", runner.token())]
        assert http.get("/_ash/files", headers=doubled).status_code == 401


def test_unknown_paths_and_methods_are_told(runner: Runner) -> None:
    with runner.http() as http:
        assert http.get("/").status_code == 404
        assert http.delete("/_ash/health").status_code == 405
        assert http.get("/_ash/../_ash/nothing").status_code == 404


def test_a_file_goes_in_and_comes_out_as_a_stream(runner: Runner) -> None:
    data = os.urandom(3_000_000)
    with runner.http() as http:
        put = http.put("/_ash/files", params={"path": "deep/er/f"}, content=iter([data[:1000], data[1000:]]))
        assert (put.status_code, put.json()) == (201, {"bytes": len(data)})
        assert http.put("/_ash/files", params={"path": "deep/er/f"}, content=data).status_code == 200
        got = http.get("/_ash/files", params={"path": str(runner.workspace / "deep/er/f")})
        assert got.content == data and got.headers["content-length"] == str(len(data))
        assert os.listdir(runner.workspace / "deep/er") == ["f"]


def test_an_upload_that_breaks_off_leaves_nothing(runner: Runner) -> None:
    folder = runner.workspace / "broken"

    def broken() -> Generator[bytes]:
        yield b"half"
        _wait_until(lambda: folder.is_dir() and os.listdir(folder) != [])
        raise InterruptedError

    with runner.http() as http, pytest.raises(InterruptedError):
        http.put("/_ash/files", params={"path": "broken/f"}, content=broken())
    with runner.http() as http:
        _wait_until(lambda: os.listdir(folder) == [])
        assert http.get("/_ash/files", params={"path": "broken/f"}).status_code == 404


@pytest.mark.parametrize(
    ("query", "status", "kind"),
    [
        ("path=missing", 404, "file_not_found"),
        ("path=.", 409, "is_a_directory"),
        ("path=", 400, "bad_request"),
        ("", 400, "bad_request"),
        ("path=a&path=b", 400, "bad_request"),
        ("path=/proc/1/mem%00", 400, "bad_request"),
    ],
)
def test_files_fail_with_status_and_kind(runner: Runner, query: str, status: int, kind: str) -> None:
    with runner.http() as http:
        answer = http.get(f"/_ash/files?{query}")
        assert (answer.status_code, answer.json()["error"]["kind"]) == (status, kind)


def test_an_odd_file_name_is_reached(runner: Runner) -> None:
    (runner.workspace / os.fsdecode(b"\xff & %2F+")).write_text("odd")
    with runner.http() as http:
        assert http.get("/_ash/files?path=%FF%20%26%20%252F%2B").text == "odd"


def test_nothing_that_is_the_runners_own_reaches_a_command(runner: Runner) -> None:
    with runner.http() as http:
        found = modern_call(http, "ash_exec", {"command": "env; ls /proc/self/fd"})["structuredContent"]["stdout"]
    names = {line.partition("=")[0] for line in found.splitlines()}
    assert not names & {"ASH_LISTEN_FD", "ASH_RUNNER_CONFIG", "PYTHONPATH", "PYTHONHOME"}
    assert "OF_THE_RECIPE=yes" in found and f"HOME={runner.home}" in found
    assert [line for line in found.splitlines() if line.isdecimal()] == ["0", "1", "2", "3"]  # 3 is ls's own


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[", "JSON object"),
        (b"[]", "JSON object"),
        (b'{"env": []}', "env is an object"),
        (b'{"env": {"A": 1}}', "'A' in env is not a string"),
        (b'{"secrets": {"A-B": "hidden"}}', "'A-B'"),
        (b'{"secrets": {"A": "hidden\\u0000"}}', "variable A holds a NUL"),
    ],
)
def test_a_bad_claim_claims_nothing(runner: Runner, body: bytes, words: str) -> None:
    with runner.http() as http:
        answer = http.post("/_ash/claim", content=body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        assert "hidden" not in answer.text


def test_a_claim_reaches_recipe_commands_and_jobs_once() -> None:
    with running(ECHO) as runner, runner.http() as http:
        claim = {"env": {"WHO": "you"}, "secrets": {"TOKEN": "s3cret-value"}}
        assert http.post("/_ash/claim", json=claim).json() == {"claimed": True}
        assert modern_call(http, "whoami")["structuredContent"] == {"who": "you"}
        done = modern_call(http, "ash_exec", {"command": "echo $WHO $TOKEN"})
        assert done["structuredContent"]["stdout"] == "you s3cret-value\n"
        again = http.post("/_ash/claim", json={"env": {"WHO": "other"}})
        assert again.status_code == 409 and again.json()["error"]["kind"] == "conflict"
        assert modern_call(http, "whoami")["structuredContent"] == {"who": "you"}
        environ = Path(f"/proc/{runner.process.pid}/environ")
        if os.geteuid() == 0:
            assert b"s3cret-value" not in environ.read_bytes()
        else:
            with pytest.raises(PermissionError):  # the runner cannot be dumped, not even by its own user
                environ.read_bytes()
        assert b"s3cret-value" not in runner.log.read_bytes()


def test_one_that_starts_anew_serves_nobody_before_its_claim() -> None:
    launcher = ("env", "ASH_CLAIM_FIRST=1", sys.executable, "-m", "ash_recipes.runner")
    with running(ECHO, launcher=launcher) as runner, runner.http() as http:
        for path in ("/_ash/files?path=x", "/mcp"):
            refused = http.post(path, json={}) if path == "/mcp" else http.get(path)
            assert refused.status_code == 503 and refused.json()["error"]["retryable"], refused.text
        assert http.get("/_ash/health").status_code == 200
        assert http.post("/_ash/claim", json={"env": {}, "secrets": {}}).status_code == 200
        assert http.get("/_ash/files?path=x").status_code == 404


def test_a_claim_starts_a_command_server_again() -> None:
    with running(LEGACY) as runner, runner.http() as http:
        assert modern_call(http, "whoami")["content"][0]["text"] == "nobody"
        assert http.post("/_ash/claim", json={"env": {"WHO": "you"}}).status_code == 200
        assert modern_call(http, "whoami")["content"][0]["text"] == "you"


def test_a_runner_whose_recipe_cannot_start_says_why() -> None:
    with running({"python": "no.such.module:server"}) as runner, runner.http() as http:
        for answer in (http.get("/_ash/health"), http.post("/mcp"), http.post("/_ash/claim", json={})):
            assert answer.status_code == 500 and answer.json()["error"]["kind"] == "start_failed"
            assert "No module named 'no'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("server", [ECHO, LEGACY], ids=["python", "stdio"])
def test_sigterm_ends_jobs_calls_and_the_runner_within_two_seconds(server: dict[str, Any]) -> None:
    with running(server) as runner, runner.http() as http:
        command = "trap '' TERM; echo $$ > pid; while :; do sleep 1; done"
        modern_call(http, "ash_job_start", {"command": command})
        pid = runner.workspace / "pid"
        answered: list[int] = []
        waiting = threading.Thread(target=_call_that_is_ended, args=(runner, answered))
        waiting.start()
        for path in (pid, runner.workspace / "called"):
            _wait_until(lambda path=path: path.exists() and path.read_text() != "")
        code, seconds = runner.stop()
        waiting.join(5)
        assert code == 0 and seconds < 2.0 and answered == [137]
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def _call_that_is_ended(runner: Runner, answered: list[int]) -> None:
    with runner.http() as http:
        done = modern_call(http, "ash_exec", {"command": "echo yes > called; sleep 60"})
        answered.append(done["structuredContent"]["exit_code"])


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wrong_environment_is_told() -> None:
    base = {name: value for name, value in os.environ.items() if not name.startswith("ASH_")}
    base["PYTHONPATH"] = os.pathsep.join(sys.path)
    for more, words in (
        ({}, "set one of ASH_LISTEN_FD and ASH_LISTEN"),
        ({"ASH_LISTEN": "nowhere"}, "not host:port"),
        ({"ASH_LISTEN_FD": "x"}, "not the number of a descriptor"),
        ({"ASH_LISTEN_FD": "999"}, "cannot listen"),
        ({"ASH_LISTEN": "127.0.0.1:0", "ASH_RUNNER_CONFIG": "{"}, "is not JSON"),
        ({"ASH_LISTEN": "127.0.0.1:0", "ASH_RUNNER_CONFIG": '{"env": 1}'}, "env is not an object"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ash_recipes.runner"], env={**base, **more}, capture_output=True, text=True
        )
        assert done.returncode == 2 and words in done.stderr


def test_orphans_are_reaped_where_they_come_to_the_runner() -> None:
    """The runner is its tree's subreaper here, as it is where it is process 1."""
    launch = (
        "import ctypes, os, sys;"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0);"
        "os.execv(sys.executable, [sys.executable, '-m', 'ash_recipes.runner'])"
    )
    with running(ECHO, launcher=[sys.executable, "-c", launch]) as runner, runner.http() as http:
        # A child of a child that has gone comes to the first process, which must notice its end.
        modern_call(http, "ash_exec", {"command": "(sh -c 'echo $$ > orphan; sleep 1' &) ; exit 0"})
        orphan = int((runner.workspace / "orphan").read_text())
        parent = int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent == runner.process.pid
        _wait_until(lambda: not Path(f"/proc/{orphan}").exists())
        done = modern_call(http, "ash_exec", {"command": "exit 7"})
        assert done["structuredContent"]["exit_code"] == 7
        children = Path(f"/proc/{runner.process.pid}/task/{runner.process.pid}/children").read_text().split()
        code, seconds = runner.stop()
        assert code == 0 and seconds < 2.0 and len(children) == 1
        assert not Path(f"/proc/{children[0]}").exists()


def test_a_failing_runner_hands_on_how_it_ended() -> None:
    launch = (
        "import ctypes, os, sys;"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0);"
        "os.execv(sys.executable, [sys.executable, '-m', 'ash_recipes.runner'])"
    )
    with running(ECHO, launcher=[sys.executable, "-c", launch]) as runner, runner.http() as http:
        assert http.get("/_ash/health").status_code == 200
        (child,) = Path(f"/proc/{runner.process.pid}/task/{runner.process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert runner.process.wait(5) == 137


def test_a_port_serves_as_well_as_a_descriptor() -> None:
    with running(ECHO, port=True) as runner, runner.http() as http:
        assert modern_call(http, "echo", {"text": "hi"})["structuredContent"] == {"text": "hi"}
        assert json.loads(http.get("/_ash/health").text)["status"] == "ready"


def test_the_garbage_collector_rests_while_a_recipe_starts_and_not_longer() -> None:
    with running({"python": "collecting_server:server"}) as runner, runner.http() as http:
        starting, serving = modern_call(http, "thresholds")["structuredContent"]["result"]
    assert serving == gc.get_threshold()[0] < starting
