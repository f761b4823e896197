"""Fixtures of the hub's tests."""

from __future__ import annotations

import functools

import pytest

from ash_hub.backends.local import host


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@functools.cache
def _failure() -> str | None:
    return host.isolation_works(host.host_facts())


@pytest.fixture
def isolation() -> None:
    """Skip where sandboxes cannot be isolated, saying why."""
    if failure := _failure():
        pytest.skip(f"sandboxes cannot be isolated here: {failure}")
