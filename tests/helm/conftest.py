"""What tests of the chart may use."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.helm.installed import Release, installed


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def door_port() -> int:
    """A port of this machine, by which pages may have come that call the hive."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def hive(door_port: int) -> Iterator[Release]:
    """A release with two hubs and a router, for all tests that leave it as it was."""
    origins = [f"http://{host}:{door_port}" for host in ("localhost", "127.0.0.1")]
    with installed(hub={"settings": {"allowed_origins": origins}}) as release:
        yield release
