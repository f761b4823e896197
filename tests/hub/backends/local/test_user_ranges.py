"""Ranges of the host's users: each is one sandbox's at a time, for all hives of a host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ash_hub.backends.local.keeper.user_ranges import RangeProblem, UserRanges, lock_problem

BLOCK = (1_000_000, 300)


def test_no_two_hives_have_the_same_range(tmp_path: Path) -> None:
    one, other = (UserRanges(str(tmp_path / "lock")) for _ in range(2))
    taken = [it.take(BLOCK, 100) for it in (one, other, one)]
    assert sorted(first for first, _ in taken) == [1_000_000, 1_000_100, 1_000_200]
    with pytest.raises(RangeProblem, match="all 3 ranges of 100 users from 1000000 on are taken"):
        other.take(BLOCK, 100)
    os.close(taken[1][1])
    first, held = other.take(BLOCK, 100)
    assert first == taken[1][0]
    for descriptor in (held, taken[0][1], taken[2][1]):
        os.close(descriptor)


def test_blocks_that_overlap_are_one(tmp_path: Path) -> None:
    ranges = UserRanges(str(tmp_path / "lock"))
    first, held = ranges.take((1_000_050, 100), 100)
    assert first == 1_000_050
    with pytest.raises(RangeProblem):
        UserRanges(str(tmp_path / "lock")).take((1_000_000, 200), 100)
    os.close(held)


def test_a_range_that_was_given_back_is_taken_last(tmp_path: Path) -> None:
    ranges = UserRanges(str(tmp_path / "lock"), start=0)
    for expected in (1_000_000, 1_000_100, 1_000_200, 1_000_000):
        first, held = ranges.take(BLOCK, 100)
        assert first == expected
        os.close(held)


def test_a_keeper_begins_with_any_range(tmp_path: Path) -> None:
    block, found = (1_000_000, 100_000_000), set[int]()
    for _ in range(3):
        first, held = UserRanges(str(tmp_path / "lock")).take(block, 100)
        os.close(held)
        found.add(first)
    assert len(found) > 1 and all(first % 100 == 0 for first in found)


def test_a_block_of_ones_own_has_a_lock_of_its_own(tmp_path: Path) -> None:
    ranges = UserRanges(str(tmp_path / "lock"), start=0)
    taken = [ranges.take(BLOCK, 300, path) for path in (None, str(tmp_path / "other"))]
    assert [first for first, _ in taken] == [1_000_000, 1_000_000]
    for _, held in taken:
        os.close(held)


def test_a_range_stays_taken_while_anybody_has_its_descriptor(tmp_path: Path) -> None:
    ranges = UserRanges(str(tmp_path / "lock"))
    _, held = ranges.take((1_000_000, 100), 100)
    copy = os.dup(held)
    os.close(held)
    with pytest.raises(RangeProblem):
        ranges.take((1_000_000, 100), 100)
    os.close(copy)
    os.close(ranges.take((1_000_000, 100), 100)[1])


def test_a_lock_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").touch(mode=0o666)
    (tmp_path / "lock").chmod(0o666)
    with pytest.raises(RangeProblem, match="not a file of this user alone"):
        UserRanges(str(tmp_path / "lock")).take(BLOCK, 100)


def test_a_file_that_cannot_be_locked_is_a_reason_against_machines(tmp_path: Path) -> None:
    assert lock_problem(str(tmp_path / "lock")) is None
    assert "No such file" in (lock_problem(str(tmp_path / "absent/lock")) or "")
    (tmp_path / "open").touch()
    (tmp_path / "open").chmod(0o666)
    assert "not a file of this user alone" in (lock_problem(str(tmp_path / "open")) or "")
