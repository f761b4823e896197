"""The bounds of the relay: the defaults that the documents name, what counts of a head, and how a refusal is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ash_mcp.errors import AshError
from ash_mcp.types import Principal, PrincipalLimits, SandboxId
from ash_router.bounds.limits import DEFAULT_LIMITS, HeadMeter, RelayLimits

KIB, MIB = 1024, 1024 * 1024
HEADERS = ((b"host", b"hive"), (b"accept", b"*/*"))
SIZE = len(b"/mcp" + b"host" + b"hive" + b"accept" + b"*/*")


def test_the_defaults_are_those_that_the_documents_name() -> None:
    assert DEFAULT_LIMITS == RelayLimits(
        max_head_bytes=64 * KIB,
        max_headers=100,
        max_body_bytes=4 * MIB,
        max_direct_body_bytes=64 * MIB,
        head_timeout_seconds=10,
        body_timeout_seconds=30,
        lookup_timeout_seconds=1,
        max_in_flight_per_owner=256,
        max_streams_per_owner=2048,
        max_backchannels_per_owner=2048,
        max_unfinished_per_owner=256,
        max_unfinished_bytes_per_owner=64 * MIB,
        high_water_bytes=64 * KIB,
    )
    assert DEFAULT_LIMITS.idle_upstream_seconds < 5, "uvicorn in the sandbox would be the one who closes"
    assert DEFAULT_LIMITS.quiet_seconds < 10, "a long call shows a sign of life every 10 s at the least"


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        (RelayLimits(), 1.0),
        (RelayLimits(idle_stream_seconds=None), 1.0),
        (RelayLimits(idle_stream_seconds=2.0), 0.5),
        (RelayLimits(idle_stream_seconds=None, body_timeout_seconds=2.0), 0.5),
        (RelayLimits(idle_stream_seconds=8.0, body_timeout_seconds=4.2), 1.0),
        (RelayLimits(quiet_seconds=2.0), 0.5),
    ],
)
def test_silence_is_looked_for_each_second_or_four_times_within_its_bound(limits: RelayLimits, seconds: float) -> None:
    assert limits.sweep_seconds == seconds


@pytest.mark.parametrize(
    "exceeded", [RelayLimits.head_exceeded, RelayLimits.body_exceeded, RelayLimits.direct_body_exceeded]
)
def test_what_is_too_large_is_so_for_good(exceeded: Callable[[RelayLimits], AshError]) -> None:
    assert not exceeded(DEFAULT_LIMITS).retryable


def test_what_is_too_many_may_come_again_in_a_second() -> None:
    refusal = DEFAULT_LIMITS.unfinished_exceeded()
    assert (refusal.retryable, refusal.data["retry_after_seconds"]) == (True, 1.0)


def test_of_a_principal_the_narrower_of_the_hives_and_its_keys_limits_holds() -> None:
    hive = RelayLimits(max_in_flight_per_owner=3, max_streams_per_owner=4, max_backchannels_per_owner=5)
    anybody, bearer = Principal("a"), Principal("a", limits=PrincipalLimits(calls=1, streams=2, backchannels=9))
    for principal, most in ((anybody, (3, 4, 5)), (bearer, (1, 2, 5))):
        found = hive.calls_of(principal), hive.streams_of(principal), hive.backchannels_of(principal)
        assert tuple(limit.most for limit in found) == most
    for principal, by_share in ((bearer, False), (replace(bearer, share="s"), True)):
        found = hive.calls_of(principal), hive.streams_of(principal)
        assert all((limit.by_share, limit.by_key) == (by_share, not by_share) for limit in found)
        lower = replace(hive, max_backchannels_per_owner=10).backchannels_of(principal)
        assert (lower.by_share, lower.by_key) == (by_share, not by_share)


def test_a_body_is_told_the_limit_that_it_has() -> None:
    limits = RelayLimits(max_direct_body_bytes=7)
    assert "7 bytes" in limits.direct_body_exceeded().message and "5 bytes" in limits.direct_body_exceeded(5).message


def test_guests_are_told_what_of_theirs_is_too_many() -> None:
    limits = RelayLimits(max_in_flight_per_owner=3, max_streams_per_owner=4)
    assert "have 3 calls open" in limits.guests_exceeded("calls").message
    assert "have 4 streams open" in limits.guests_exceeded("streams").message


@pytest.mark.parametrize(("most", "is_refused"), [(1, False), (0, True)])
def test_who_has_no_call_in_flight_may_have_one_where_one_is_allowed(most: int, is_refused: bool) -> None:
    caller = Principal("a", limits=PrincipalLimits(calls=most), sandbox=SandboxId("sbx-1"), share="s")
    refusal = RelayLimits(max_in_flight_per_owner=1).call_refusal(caller, {})
    assert (refusal is not None) is is_refused


@pytest.mark.parametrize(
    ("by_key", "in_flight", "said"),
    [
        (None, 2, None),
        (None, 3, "you have 3 calls"),
        (2, 1, None),
        (2, 2, "your key allows"),
        (9, 3, "one owner may have"),
    ],
)
def test_one_more_call_is_refused_at_the_narrower_limit(by_key: int | None, in_flight: int, said: str | None) -> None:
    caller = Principal("a", limits=PrincipalLimits(calls=by_key))
    refusal = RelayLimits(max_in_flight_per_owner=3).call_refusal(caller, {"a": in_flight, "b": 9})
    assert (refusal is None) if said is None else (refusal is not None and said in refusal.message)


@pytest.mark.parametrize(("others", "is_refused"), [(2, False), (3, True)])
def test_guests_of_one_sandbox_have_as_many_calls_as_one_owner(others: int, is_refused: bool) -> None:
    guest = Principal("a", sandbox=SandboxId("sbx-1"), share="s")
    refusal = RelayLimits(max_in_flight_per_owner=3).call_refusal(guest, {str(guest.guests): others})
    assert (refusal is not None and "guests of this sandbox" in refusal.message) is is_refused


def test_what_is_fed_counts_until_the_next_head() -> None:
    meter = HeadMeter(RelayLimits(max_head_bytes=10))
    assert [meter.fed(4), meter.fed(6), meter.fed(1)] == [True, True, False]
    meter.restart()
    assert [meter.fed(10), meter.fed(1)] == [True, False]


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_head_fits_to_the_byte(spare: int, fits: bool) -> None:
    assert HeadMeter(RelayLimits(max_head_bytes=SIZE + spare)).fits(b"/mcp", HEADERS) is fits


@pytest.mark.parametrize(("most", "fits"), [(2, True), (1, False)])
def test_a_head_fits_to_the_header(most: int, fits: bool) -> None:
    assert HeadMeter(RelayLimits(max_headers=most)).fits(b"/mcp", HEADERS) is fits
