"""The suites of other folders, against a hive that the chart has installed, each request by the Service to any hub.

They know the hive by `ASH_TEST_URL`, and nothing of keys: what stands before the Service adds the key.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from anyio.from_thread import start_blocking_portal

from tests.balancer import alternating
from tests.helm.installed import Release

pytestmark = pytest.mark.kubernetes

ROOT: Final = Path(__file__).parents[2]
FACE: Final = (
    "tests/system/test_mcp_clients.py",
    "tests/system/test_direct_doors.py",
    "tests/system/test_cli_commands.py",
    "tests/system/test_lost_answers.py",
)
SECONDS: Final = 280


@pytest.fixture(scope="module")
def door(hive: Release, door_port: int) -> Iterator[str]:
    """The URL of the hive on this machine, by which whoever comes has its key."""
    host = str(urlsplit(hive.address("ash")).hostname)
    with start_blocking_portal() as portal:
        headers = {"authorization": f"Bearer {hive.key}"}
        standing = alternating([80], host=host, headers=headers, own_port=door_port)
        with portal.wrap_async_context_manager(standing):
            yield f"http://127.0.0.1:{door_port}/mcp"


def passed(door: str, *words: str) -> str:
    """Run tests against the hive, and return how many did what; those that fail are shown."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", *words]
    environ = {**os.environ, "ASH_TEST_URL": door, "ASH_TEST_MUST_PASS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    (said,) = re.findall(r"^(\d+ passed.*) in .*$", done.stdout, re.MULTILINE)[-1:]
    return said


@pytest.mark.timeout(SECONDS + 20)
def test_the_mcp_face_is_that_of_any_hive(door: str, record_property: Callable[[str, Any], None]) -> None:
    record_property("the MCP face", passed(door, "-m", "not node and not clients and not kubernetes", *FACE))


@pytest.mark.timeout(SECONDS + 20)
def test_mcps_own_tools_find_what_they_find_at_any_hive(
    door: str, node_bin: Path, record_property: Callable[[str, Any], None]
) -> None:
    if not (node_bin / "mcp-inspector").exists():
        pytest.skip(f"{node_bin} has no MCP tools for Node: .ci/node-tools brings them")
    files = ("tests/conformance/test_mcp_conformance.py", "tests/clients/test_inspector.py")
    record_property("MCP's conformance suites and Inspector", passed(door, "-m", "node", *files))


@pytest.mark.timeout(SECONDS + 20)
def test_agent_frameworks_do_the_main_job(
    door: str, clients: Path, record_property: Callable[[str, Any], None]
) -> None:
    if not clients.exists():
        pytest.skip(f"there is no {clients}: .ci/foreign-clients makes it")
    record_property("agent frameworks", passed(door, "-m", "clients and not node", "tests/clients"))
