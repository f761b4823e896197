"""MCP's conformance suites against the hive's own endpoint and, through the relay, against a sandbox's.

Many of their checks call fixture tools that only a server made for the suite has. The hive's own endpoint has not, so
a count says little there; what is asked is that no check which a plain FastMCP server passes fails at the hive. A
sandbox can have them (`suite_server.py`), and must score through the relay what its runner scores without one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from mcp.client import Client

from tests.hive_process import running_hive

pytestmark = pytest.mark.node

PLAIN_SERVER = Path(__file__).parent / "plain_server.py"
SUITE_SERVER = Path(__file__).parent / "suite_server.py"
SUITES = {
    "conformance-2025-11-25": ("--suite", "all"),
    "conformance-2026-07-28": ("--suite", "all", "--spec-version", "2026-07-28"),
}
FLOORS = {"conformance-2025-11-25": 10, "conformance-2026-07-28": 80}
"""Checks that the hive passes at least, so that the comparison is never one of two empty lists."""

SANDBOX_FLOORS = {"conformance-2025-11-25": 43, "conformance-2026-07-28": 145}
"""The same for the suites' own server."""

Checks = Mapping[tuple[str, str], Counter[str]]
"""How often a scenario's check ended in which status."""


@pytest.fixture(scope="module")
def plain_url() -> Iterator[str]:
    port = _free_port()
    with subprocess.Popen([sys.executable, str(PLAIN_SERVER), str(port)]) as process:
        try:
            _wait_until_listening(port, process)
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def runner_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The suites' server in a runner that nothing stands before but a copy of bytes, and that asks for no token.

    On TCP itself it would not serve without one.
    """
    folder = tmp_path_factory.mktemp("runner")
    port = _free_port()
    serves = {"server": {"python": "suite_server:server"}, "workspace": str(folder), "home": str(folder)}
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        path = f"{short}/socket"
        listener.bind(path)
        listener.listen(64)
        environ = {
            **os.environ,
            "PYTHONPATH": str(SUITE_SERVER.parent),
            "ASH_LISTEN_FD": str(listener.fileno()),
            "ASH_RUNNER_CONFIG": json.dumps(serves),
        }
        copying = (
            "import asyncio; from ash_recipes.runner import forwarder; "
            f"asyncio.run(forwarder.serve({path!r}, port={port}))"
        )
        runner = [sys.executable, "-m", "ash_recipes.runner"]
        with (
            subprocess.Popen(runner, env=environ, pass_fds=[listener.fileno()]) as process,
            subprocess.Popen([sys.executable, "-c", copying]) as copier,
        ):
            try:
                _wait_until_listening(port, copier)
                _wait_until_ready(f"http://127.0.0.1:{port}/_ash/health")
                yield f"http://127.0.0.1:{port}/mcp"
            finally:
                copier.terminate()
                process.terminate()


@pytest.fixture(scope="module")
def sandbox_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same server in a sandbox, by its door of a hive that runs in a process of its own."""
    if os.environ.get("ASH_TEST_URL"):
        pytest.skip("the hive that ASH_TEST_URL names does not have the suites' recipe")
    folder = tmp_path_factory.mktemp("recipes") / "conformance"
    folder.mkdir()
    shutil.copy(SUITE_SERVER, folder)
    (folder / "recipe.toml").write_text(
        'name = "conformance"\ndescription = "What the suites call."\nserver = { python = "suite_server:server" }\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASH_HUB_RECIPE_DIRS", json.dumps([str(folder)]))
        with running_hive() as url:
            session = anyio.run(_spawn, url)
            yield f"{url.removesuffix('/mcp')}/s/{session}/mcp"


async def _spawn(url: str) -> str:
    async with Client(url) as client:
        made = await client.call_tool("spawn", {"recipe": "conformance"})
    assert made.structured_content is not None, made.content
    return made.structured_content["session"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server did not start")


def _wait_until_ready(url: str) -> None:
    assert httpx.get(url, timeout=60).json()["status"] == "ready"


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.timeout(400)
def test_the_hive_fails_no_check_that_a_plain_fastmcp_server_passes(
    suite: str, hive_url: str, plain_url: str, node_bin: Path, tmp_path: Path
) -> None:
    ours = _run(node_bin, suite, hive_url, tmp_path / "hive")
    plain = _run(node_bin, suite, plain_url, tmp_path / "plain")
    passed = sum(counts["SUCCESS"] for counts in ours.values())
    assert passed >= FLOORS[suite], f"the hive passed only {passed} checks"
    worse = {
        check: {"hive": dict(ours.get(check, {})), "plain FastMCP": dict(counts)}
        for check, counts in plain.items()
        if _is_worse(ours.get(check, Counter()), counts)
    }
    unknown = {check: dict(counts) for check, counts in ours.items() if check not in plain and counts["FAILURE"]}
    assert not worse and not unknown


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.timeout(400)
def test_a_sandboxs_server_scores_through_the_relay_what_it_scores_directly(
    suite: str, sandbox_url: str, runner_url: str, node_bin: Path, tmp_path: Path
) -> None:
    directly = _run(node_bin, suite, runner_url, tmp_path / "directly")
    relayed = _run(node_bin, suite, sandbox_url, tmp_path / "relayed")
    passed = sum(counts["SUCCESS"] for counts in directly.values())
    print(f"{suite}: directly {_score(directly)}, through the relay {_score(relayed)}")  # noqa: T201
    assert passed >= SANDBOX_FLOORS[suite], f"the suites' own server passed only {passed} checks"
    worse = {
        check: {"relayed": dict(relayed.get(check, {})), "directly": dict(directly.get(check, {}))}
        for check in {*directly, *relayed}
        if _is_worse(relayed.get(check, Counter()), directly.get(check, Counter()))
    }
    assert not worse


def _score(checks: Checks) -> dict[str, int]:
    return dict(sum(checks.values(), Counter[str]()))


def _is_worse(ours: Counter[str], plain: Counter[str]) -> bool:
    """Say whether a check fails more often at the hive, or was not even reached there though FastMCP passes it."""
    return ours["FAILURE"] > plain["FAILURE"] or (plain["SUCCESS"] > 0 and not ours)


def _run(node_bin: Path, suite: str, url: str, output: Path) -> Checks:
    done = subprocess.run(
        [node_bin / suite, "server", "--url", url, *SUITES[suite], "-o", str(output)],
        env={**os.environ, "PATH": f"{node_bin}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for file in output.glob("*/checks.json"):
        scenario = re.sub(r"-\d{4}-\d\d-\d\dT.*", "", file.parent.name)
        checks: list[dict[str, Any]] = json.loads(file.read_text())
        for check in checks:
            found[scenario, check["id"]][check["status"]] += 1
    assert found, f"the suite checked nothing: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return found
