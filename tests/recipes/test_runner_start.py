"""Servers that cannot start, each with its reason."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest

from ash_recipes.runner.config import Listen, RunnerConfig
from ash_recipes.runner.context import Context
from ash_recipes.runner.servers.base import StartProblem
from ash_recipes.runner.service import open_server

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"python": "no.such.module:server"}, "No module named 'no'"),
        ({"python": "ash_recipes.echo.server:absent"}, "no attribute 'absent'"),
        ({"python": "os:getpid"}, "os:getpid is a int, not a FastMCP server"),
        ({"python": "os:kill"}, "os:kill could not be loaded: TypeError"),
        ({"stdio": {"command": ["/no/such/program"]}}, "No such file or directory"),
        ({"stdio": {"command": ["sh", "-c", "echo sorry >&2; exit 3"]}}, "its last words: sorry"),
        ({"stdio": {"command": []}}, "command is a list of words"),
        ({"http": {"command": ["sh", "-c", "echo sorry; exit 3"], "port": 1}}, "exit code 3 before it listened"),
        ({"http": {"command": ["true"]}}, "needs a port"),
        ({}, "none or several of python, http and stdio"),
        ({"python": "a:b", "stdio": {"command": ["true"]}}, "none or several of python, http and stdio"),
    ],
)
async def test_a_server_that_cannot_start_says_why(context: Context, server: dict[str, Any], words: str) -> None:
    config = RunnerConfig(listen=Listen(), server=server)
    async with AsyncExitStack() as stack:
        with pytest.raises(StartProblem) as raised:
            await stack.enter_async_context(open_server(config, context))
    assert words in str(raised.value)
