"""The retry policy as a table."""

from __future__ import annotations

import pytest

from ash_mcp._retry import TRANSPORT_ATTEMPTS, next_delay
from ash_mcp.errors import (
    AshError,
    AshTimeout,
    CapacityExceeded,
    ConfigError,
    ConnectFailed,
    HiveFault,
    LeaseHeld,
    SandboxGone,
    StartFailed,
    StreamBroken,
    TransportError,
)

FULL = CapacityExceeded("full", retry_after_seconds=3)


@pytest.mark.parametrize(
    ("error", "plain", "repeatable"),
    [
        (FULL, 3.0, 3.0),
        (CapacityExceeded("full", retryable=False), None, None),
        (ConnectFailed("no"), 0.1, 0.1),
        (LeaseHeld("held", retryable=True), 0.1, 0.1),
        (LeaseHeld("held"), None, None),
        (StreamBroken("torn"), None, 0.1),
        (TransportError("502"), None, 0.1),
        (AshTimeout("late"), None, None),
        (AshTimeout("never ran", retryable=True), 0.1, 0.1),
        (StartFailed("no"), None, None),
        (SandboxGone("gone"), None, None),
        (HiveFault("bug"), None, None),
        (ConfigError("bad"), None, None),
        (ValueError("not ours"), None, None),
    ],
    ids=lambda value: repr(value),
)
def test_what_is_tried_again(error: Exception, plain: float | None, repeatable: float | None):
    for again, expected in ((False, plain), (True, repeatable)):
        assert next_delay(error, attempt=1, remaining_seconds=100, repeatable=again) == expected


def test_the_way_is_tried_a_few_times_and_capacity_until_the_bound():
    lost: AshError = StreamBroken("torn")
    delays = [next_delay(lost, attempt=n, remaining_seconds=100, repeatable=True) for n in range(1, 6)]
    assert delays == [0.1, 0.2, 0.4, None, None]
    assert TRANSPORT_ATTEMPTS == 4
    assert next_delay(FULL, attempt=1000, remaining_seconds=100, repeatable=False) == 3.0


def test_wait_that_would_outlast_the_bound_is_not_begun():
    assert next_delay(FULL, attempt=1, remaining_seconds=2.9, repeatable=True) is None


def test_hive_that_says_to_come_back_at_once_is_not_hammered():
    assert next_delay(
        CapacityExceeded("full", retry_after_seconds=-5), attempt=1, remaining_seconds=9, repeatable=False
    ) == pytest.approx(0.05)
