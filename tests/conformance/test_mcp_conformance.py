"""MCP's conformance suites against the hive's own endpoint, compared with a plain FastMCP server in the same run.

Many of their checks call fixture tools that only a server made for the suite has, so a count says little. What is
asked is that no check which FastMCP passes fails at the hive.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.node

PLAIN_SERVER = Path(__file__).parent / "plain_server.py"
SUITES = {
    "conformance-2025-11-25": ("--suite", "all"),
    "conformance-2026-07-28": ("--suite", "all", "--spec-version", "2026-07-28"),
}
FLOORS = {"conformance-2025-11-25": 10, "conformance-2026-07-28": 80}
"""Checks that the hive passes at least, so that the comparison is never one of two empty lists."""

Checks = Mapping[tuple[str, str], Counter[str]]
"""How often a scenario's check ended in which status."""


@pytest.fixture(scope="module")
def plain_url() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, str(PLAIN_SERVER), str(port)]) as process:
        try:
            _wait_until_listening(port, process)
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.terminate()


def _wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the plain server did not start")


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
