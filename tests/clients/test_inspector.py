"""The MCP Inspector's command line as a client of a real hive."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.one_sandbox import doors_to_one_sandbox

pytestmark = pytest.mark.node


@pytest.fixture
def inspect(hive_url: str, node_bin: Path, tmp_path: Path) -> Any:
    def run(*arguments: str, url: str = hive_url) -> Any:
        done = subprocess.run(
            [node_bin / "mcp-inspector", "--cli", url, "--transport", "http", *arguments],
            env={**os.environ, "PATH": f"{node_bin}:{os.environ['PATH']}", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def test_the_inspector_does_the_main_job_and_finds_every_schema_portable(inspect: Any) -> None:
    spawn = ("--method", "tools/call", "--tool-name", "spawn", "--tool-arg", "recipe=general")
    session = inspect(*spawn)["structuredContent"]["session"]
    try:
        listed = inspect("--method", "tools/list", "--strict")["tools"]
        assert {"spawn", "call", f"{session}_terminal-controller_execute_command"} <= {tool["name"] for tool in listed}
        call = ("--method", "tools/call", "--tool-name", f"{session}_terminal-controller_execute_command")
        done = inspect(*call, "--tool-arg", "command=echo hello")
        assert done["structuredContent"]["stdout"] == "hello\n"
        templates = inspect("--method", "resources/templates/list")["resourceTemplates"]
        assert templates[0]["uriTemplate"] == "sandbox://{session}/{+path}"
    finally:
        destroy = ("--method", "tools/call", "--tool-name", "destroy", "--tool-arg", f"session={session}")
        assert inspect(*destroy)["structuredContent"]["destroyed"]


def test_the_inspector_reaches_one_sandbox_by_a_share_and_by_a_header(inspect: Any, hive_url: str) -> None:
    with doors_to_one_sandbox(hive_url) as doors:
        for door in doors:
            ((name, value),) = door.headers.items()
            header = ("--header", f"{name}: {value}")
            listed = inspect("--method", "tools/list", *header, url=door.url)["tools"]
            assert sorted(tool["name"] for tool in listed) == list(door.tools)
            call = ("--method", "tools/call", "--tool-name", "echo", "--tool-arg", "text=hello")
            assert inspect(*call, *header, url=door.url)["structuredContent"] == {"text": "hello"}
