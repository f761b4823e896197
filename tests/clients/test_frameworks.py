"""Agent frameworks use a real hive through their own MCP config, without a model."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Final

import pytest

from tests.clients.one_sandbox import doors_to_one_sandbox
from tests.example_runs import run_example

pytestmark = pytest.mark.clients

DOORS: Final = Path(__file__).with_name("framework_doors.py")
PACKAGES = {
    "langchain_tools": "langchain-mcp-adapters",
    "openai_agents_tools": "openai-agents",
    "pydantic_ai_tools": "pydantic-ai-slim",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_an_agent_framework_does_the_main_job(hive_url: str, clients: Path, name: str) -> None:
    said = run_example(hive_url, name, python=str(clients / PACKAGES[name] / "bin/python"))
    assert "brought 20 tools" in said
    assert "hello from Linux" in said
    assert said.endswith("is gone\n")


@pytest.mark.parametrize("name", PACKAGES)
def test_an_agent_framework_reaches_one_sandbox_by_a_share_and_by_a_header(
    hive_url: str, clients: Path, name: str
) -> None:
    python = clients / PACKAGES[name] / "bin/python"
    with doors_to_one_sandbox(hive_url) as doors:
        asked = json.dumps([asdict(door) for door in doors])
        done = subprocess.run([python, DOORS, name], input=asked, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tools for tools, _ in seen] == [list(door.tools) for door in doors]
    assert all("hello" in said for _, said in seen)
