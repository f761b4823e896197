"""The retry policy as a table."""

from __future__ import annotations

import pytest

from ash_mcp import _retry
from ash_mcp._retry import TRANSPORT_ATTEMPTS, call_again, next_delay
from ash_mcp.errors import (
    AshError,
    AshTimeout,
    CapacityExceeded,
    ConfigError,
    ConnectFailed,
    HiveFault,
    SandboxGone,
    SessionTaken,
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
        (SessionTaken("taken", retryable=True), 0.1, 0.1),
        (SessionTaken("taken"), None, None),
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


class Attempts:
    """Tries that end in these errors, and then succeed; time passes only while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception, share: float = 0.0) -> None:
        self.errors = list(errors)
        self.made = 0
        self.waited: list[float] = []
        self.said: list[tuple[str, float]] = []
        self.jitters: list[tuple[float, float]] = []
        self._share = share
        monkeypatch.setattr(_retry.anyio, "sleep", self._sleep)
        monkeypatch.setattr(_retry.random, "uniform", self._uniform)

    async def _sleep(self, seconds: float) -> None:
        self.waited.append(seconds)

    def _uniform(self, least: float, most: float) -> float:
        self.jitters.append((least, most))
        return least + self._share * (most - least)

    async def _attempt(self) -> str:
        self.made += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def run(self, *, repeatable: bool = True, limit_seconds: float = 100.0) -> str:
        return await call_again(
            self._attempt,
            remaining_seconds=lambda: limit_seconds - sum(self.waited),
            repeatable=repeatable,
            on_wait=lambda error, delay: self.said.append((error.message, delay)),
        )


@pytest.mark.anyio
async def test_each_wait_is_the_one_that_its_own_error_asks_for(monkeypatch: pytest.MonkeyPatch):
    attempts = Attempts(monkeypatch, FULL, StreamBroken("torn"), CapacityExceeded("full", retry_after_seconds=7))
    assert await attempts.run() == "done"
    assert attempts.made == 4 and attempts.waited == [3.0, 0.2, 7.0]
    assert attempts.said == [("full", 3.0), ("torn", 0.2), ("full", 7.0)]


@pytest.mark.anyio
async def test_first_wait_is_the_shortest_and_they_double(monkeypatch: pytest.MonkeyPatch):
    attempts = Attempts(monkeypatch, *[StreamBroken("torn")] * 9)
    with pytest.raises(StreamBroken):
        await attempts.run()
    assert attempts.made == TRANSPORT_ATTEMPTS and attempts.waited == [0.1, 0.2, 0.4]


@pytest.mark.anyio
async def test_waits_are_spread_upwards_by_a_quarter_at_most(monkeypatch: pytest.MonkeyPatch):
    attempts = Attempts(monkeypatch, ConnectFailed("no"), ConnectFailed("no"), share=1.0)
    assert await attempts.run(repeatable=False) == "done"
    assert attempts.waited == pytest.approx([0.125, 0.25]) and attempts.jitters == [(0, 0.025), (0, 0.05)]


@pytest.mark.anyio
async def test_attempt_that_succeeds_at_once_waits_for_nothing(monkeypatch: pytest.MonkeyPatch):
    attempts = Attempts(monkeypatch)
    assert await attempts.run() == "done" and (attempts.made, attempts.waited, attempts.said) == (1, [], [])


@pytest.mark.anyio
async def test_bound_is_looked_at_again_after_each_failure(monkeypatch: pytest.MonkeyPatch):
    attempts = Attempts(monkeypatch, *[FULL] * 9)
    with pytest.raises(CapacityExceeded):
        await attempts.run(limit_seconds=7)
    assert attempts.waited == [3.0, 3.0]
