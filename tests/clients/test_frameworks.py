"""Agent frameworks use a real hive through their own MCP config, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.example_runs import run_example

pytestmark = pytest.mark.clients

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
