"""The examples run as they are, against a real hive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FOREIGN = ("langchain_tools", "openai_agents_tools", "pydantic_ai_tools")


def run_example(url: str, name: str, *arguments: str, python: str = sys.executable) -> str:
    """Run an example to its end and return what it printed."""
    done = subprocess.run(
        [python, str(EXAMPLES / f"{name}.py"), *arguments],
        env={**os.environ, "ASH_URL": url},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_sdk_quickstart_runs(hive_url: str) -> None:
    said = run_example(hive_url, "sdk_quickstart")
    assert "exit code 0: 'hello you\\nLinux\\n'" in said
    assert "1. look around\n2. tidy up\n" in said
    assert said.endswith("and gone again\n")


def test_the_parallel_rollouts_tell_their_failures_apart(hive_url: str) -> None:
    said = run_example(hive_url, "parallel_rollouts", "4")
    assert said == "right: 1\ntoo slow: 1\nwrong: 2\n4 of 4 rollouts to learn from, mean reward 0.25\n"


@pytest.mark.parametrize("options", [(), ("--stdio", "--legacy")])
def test_the_mcp_sdks_client_runs(hive_url: str, options: tuple[str, ...]) -> None:
    said = run_example(hive_url, "mcp_sdk_client", *options)
    assert ("protocol 2025-11-25" if options else "protocol 2026-07-28") in said
    assert "hello from Linux\n" in said
    assert said.endswith("is gone\n")


def test_fastmcps_client_runs(hive_url: str) -> None:
    said = run_example(hive_url, "fastmcp_client")
    assert "hello from Linux\n" in said
    assert said.endswith("is gone\n")


@pytest.mark.clients
@pytest.mark.parametrize("name", FOREIGN)
def test_an_agent_framework_uses_the_hive_by_its_own_mcp_config(hive_url: str, clients_python: str, name: str) -> None:
    said = run_example(hive_url, name, python=clients_python)
    assert "brought 20 tools" in said
    assert "hello from Linux" in said
    assert said.endswith("is gone\n")


def test_the_readme_lists_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f"({example.name})" in readme
