"""A real hive for all system tests that need no settings of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hive_process import running_hive
from tests.redis_server import RedisServer, running_redis


@pytest.fixture(scope="session")
def hive_url() -> Iterator[str]:
    """The URL of a hive that `ash up` serves in a process of its own, with directories of its own."""
    with running_hive() as url:
        yield url


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
