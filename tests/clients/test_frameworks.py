"""Agent frameworks use a real hive through their own MCP config, without a model."""

from __future__ import annotations

import pytest

from tests.example_runs import run_example

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("name", ["langchain_tools", "openai_agents_tools", "pydantic_ai_tools"])
def test_an_agent_framework_does_the_main_job(hive_url: str, clients_python: str, name: str) -> None:
    said = run_example(hive_url, name, python=clients_python)
    assert "brought 20 tools" in said
    assert "hello from Linux" in said
    assert said.endswith("is gone\n")
