"""What tests of the chart may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helm.installed import Release, installed


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def hive() -> Iterator[Release]:
    """A release with two hubs and a router, for all tests that leave it as it was."""
    with installed() as release:
        yield release
