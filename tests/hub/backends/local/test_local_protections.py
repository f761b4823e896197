"""Each protection does something: what is stopped with it gets out without it.

Every attempt to escape is made once more in a sandbox from which the protections that it names were taken away, and
must then succeed. Where this machine cannot show that, the test is skipped and says why.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.keeper import cgroups
from ash_hub.backends.local.paths import hive_paths
from ash_hub.testing.escapes import ATTEMPTS, Attempt, Bait, Outcome, Verdict, lay_bait, spec_for, try_to_escape
from ash_hub.testing.escapes.attempt import program, verdict
from ash_mcp.types import new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SMALL,
    SPEC,
    bash,
    directories,
    local_backend,
    needs_isolation,
    prison_of,
    settings_in,
)
from tests.hub.backends.local.weakening import BACKED_UP, CLAIMS, INHERENT, REMOVALS, Place, Removal, Weakened

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

NOTHING_THERE = "nothing on this machine listens where it asks"
UNSHOWN: Mapping[str, str] = {
    "egress: loopback on an allowed port": NOTHING_THERE,
    "egress: metadata": NOTHING_THERE,
}
"""Attempts that no machine like this one can show to succeed."""
NEIGHBOURLY = ("neighbour", "socket swapped")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bait() -> Iterator[Bait]:
    with lay_bait() as laid:
        yield laid


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with directories() as path:
        yield path


@pytest.fixture(scope="module")
async def backend(anyio_backend: str, root: Path) -> AsyncIterator[LocalBackend]:
    async with local_backend(root, **SMALL, machine=False) as entered:
        yield entered


@pytest.fixture(scope="module")
async def machines(anyio_backend: str) -> AsyncIterator[tuple[LocalBackend, Path]]:
    with directories() as path:
        async with local_backend(path, **SMALL) as entered:
            yield entered, path


async def outcome_without(attempt: Attempt, backend: LocalBackend, root: Path, bait: Bait) -> Outcome:
    """Make an attempt in a sandbox without the protections that stop it."""
    removals = [REMOVALS[name] for name in attempt.stopped_by]
    settings = {key: value for removal in removals for key, value in removal.settings.items()}
    if settings:
        chosen: dict[str, Any] = {**SMALL, "machine": False, **settings}
        with directories() as other_root:
            async with local_backend(other_root, **chosen) as weaker:
                return await weakly_tried(attempt, removals, weaker, other_root, bait)
    return await weakly_tried(attempt, removals, backend, root, bait)


async def weakly_tried(
    attempt: Attempt, removals: list[Removal], backend: LocalBackend, root: Path, bait: Bait
) -> Outcome:
    place = Place(root, str(hive_paths(settings_in(root)).directory), bait)
    prison = prison_of(backend, root)
    prison = replace(prison, bounds={**CLAIMS, **prison.bounds})
    spec = spec_for(attempt, prison, bait, SPEC)
    for removal in removals:
        if removal.network is not None:
            spec = replace(spec, network=removal.network(place))
    async with weakened(backend, removals, place):
        inside = await backend.create(replace(spec, id=new_sandbox_id()))
        other = inside
        if attempt.watched or attempt.name.startswith(NEIGHBOURLY):
            other = await backend.create(replace(SPEC, id=new_sandbox_id(), env={"NEIGHBOUR_SECRET": "x"}))
            assert (await bash(other, "for p in /workspace /tmp /dev/shm; do echo neighbour >$p/note; done")).code == 0
        try:
            return await try_to_escape(attempt, prison, bait, inside, other)
        finally:
            for instance in (inside, other):
                await backend.delete(instance.id, grace_seconds=0)


@asynccontextmanager
async def weakened(backend: LocalBackend, removals: list[Removal], place: Place) -> AsyncGenerator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_plans", Weakened(backend._plans, removals, place))  # pyright: ignore[reportPrivateUsage]
        for removal in removals:
            for name, value in removal.patches.items():
                patch.setattr(name, value)
        yield


def unshown(attempt: Attempt) -> str | None:
    """Say why it cannot be shown here that an attempt succeeds without its protections."""
    for name in attempt.stopped_by:
        if name in INHERENT:
            return f"{name}: {INHERENT[name]}"
        if os.geteuid() != 0 and (why := REMOVALS[name].root_only):
            return f"{name}: {why}"
    if attempt.name == "control group" and not in_a_group():
        return "without control groups there is no path of one to see"
    return UNSHOWN.get(attempt.name)


def in_a_group() -> bool:
    return cgroups.usable()[0] > 0


def on_the_host(attempt: Attempt, bait: Bait) -> Outcome:
    """Make an attempt outside of any sandbox; only those on calls of the kernel, which do nothing."""
    command = program(attempt, bait.to_json(bounds={"kernel": []}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return verdict(attempt, done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    "attempt",
    [
        # alone, as a flood must get more than its share
        pytest.param(each, id=each.name, marks=pytest.mark.alone if each.name.startswith("flood: ") else ())
        for each in ATTEMPTS
    ],
)
async def test_without_its_protections_an_attempt_succeeds(
    attempt: Attempt, backend: LocalBackend, machines: tuple[LocalBackend, Path], root: Path, bait: Bait
) -> None:
    if why := unshown(attempt):
        pytest.skip(why)
    if attempt.bound == "machine":
        backend, root = machines
    outcome = await outcome_without(attempt, backend, root, bait)
    print(outcome)  # noqa: T201 - the report of the suite
    if outcome.verdict in (Verdict.ABSENT, Verdict.SHARED):
        pytest.skip(str(outcome))
    if outcome.verdict is Verdict.STOPPED and attempt.name.startswith("kernel: "):
        outside = on_the_host(attempt, bait)
        if outside.verdict is Verdict.STOPPED:
            pytest.skip(f"this machine's kernel refuses it even outside of a sandbox: {outside.how}")
    assert outcome.verdict is Verdict.ESCAPED, str(outcome)


@pytest.mark.parametrize("protection", [*REMOVALS, *INHERENT])
def test_a_protection_alone_stops_something(protection: str) -> None:
    if protection in INHERENT or protection in BACKED_UP:
        pytest.skip(INHERENT.get(protection) or BACKED_UP[protection])
    assert [attempt for attempt in ATTEMPTS if attempt.stopped_by == (protection,)]


def test_every_protection_that_an_attempt_names_is_known() -> None:
    named: set[Any] = {protection for attempt in ATTEMPTS for protection in attempt.stopped_by}
    assert named == {*REMOVALS, *INHERENT}
