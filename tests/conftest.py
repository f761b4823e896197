"""What tests of all folders may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hive_process import running_hive
from tests.redis_server import RedisServer, running_redis


@pytest.fixture(scope="session")
def hive_url() -> Iterator[str]:
    """A real hive in a process of its own, the same one for all tests that only need to be its users."""
    with running_hive() as url:
        yield url


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One redis-server for all tests that only need keys of their own there."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def node_bin() -> Path:
    """Where MCP's tools for Node are, and a Node that runs them."""
    folder = os.environ.get("ASH_TEST_NODE")
    if not folder:
        pytest.skip("ASH_TEST_NODE names no folder with Node and MCP's tools")
    return Path(folder) / "node_modules/.bin"


@pytest.fixture(scope="session")
def clients_python() -> str:
    """A Python that has the agent frameworks."""
    python = os.environ.get("ASH_TEST_CLIENTS_PYTHON")
    if not python:
        pytest.skip("ASH_TEST_CLIENTS_PYTHON names no Python with the agent frameworks")
    return python
