"""Fixtures of the tests of what runs inside a sandbox."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from ash_recipes.runner.context import Context, Environment
from ash_recipes.runner.tools import RunnerTools


@pytest.fixture
def anyio_backend() -> str:
    """The runner stands on asyncio, as uvicorn does."""
    return "asyncio"


@pytest.fixture
async def context(tmp_path: Path) -> AsyncGenerator[Context]:
    """What a runner's parts share, with its jobs running."""
    workspace, home = tmp_path / "workspace", tmp_path / "home"
    workspace.mkdir()
    home.mkdir()
    environment = Environment({"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8"})
    context = Context(workspace=workspace, home=home, environment=environment)
    async with context.jobs:
        yield context


@pytest.fixture
def tools(context: Context) -> RunnerTools:
    return RunnerTools(context)
