"""What tests of all folders may use."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.hive_process import running_hive
from tests.redis_server import RedisServer, running_redis

pytest_plugins = ["tests.reporting"]
# collection makes objects that live as long as the run: looking through them again and again is a third of its time
gc.disable()
# deadlines and the time that inputs take measure the machine
if os.geteuid() != 0:
    # a machine begins as a copy of the whole system: for the tests that are about it
    os.environ.setdefault("ASH_HUB_BACKEND__MACHINE", "false")
settings.register_profile("ash", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ash")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that several workers end at the same time."""
    tests = Path(__file__).parent
    names = ("system", "recipes", "examples", "conformance", "hub/backends", "hub/spawning", "router/replicas")
    slow = [tests / name for name in (*names, "router/store", "scripts")]
    heavy = ("hub/lifecycle/test_replica_races.py", "mutation/test_run.py", "system/test_churn.py")
    first = [
        tests / name for name in (*heavy, "system/test_crash_rounds.py", "hub/backends/local/test_local_escapes.py")
    ]

    def place(item: pytest.Item) -> int:
        if item.path in first and item.get_closest_marker("heavy"):
            return 0
        return 1 if any(folder in item.path.parents for folder in slow) else 2

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _backends_know_their_host() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    backend = sys.modules.get("ash_hub.backends.local.backend")
    if backend is None:
        yield
        return
    from tests.hub.backends.local.known_host import KnownHost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "host", KnownHost())
        yield


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory for a hive of the test's own."""
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    yield folder
    shutil.rmtree(folder)


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
def clients() -> Path:
    """Where each agent framework has a virtual environment of its own."""
    folder = os.environ.get("ASH_TEST_CLIENTS")
    if not folder:
        pytest.skip("ASH_TEST_CLIENTS names no folder with the agent frameworks")
    return Path(folder)
