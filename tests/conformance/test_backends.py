"""Every backend behaves as `backends/base.py` says."""

from __future__ import annotations

import unittest
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from ash_hub.backends.base import BackendEvent, Phase
from ash_hub.backends.memory import MemoryBackend
from ash_hub.testing.conformance import BEHAVIOURS, BackendUnderTest, Make, check_backend, nothing_escapes
from ash_mcp.types import SandboxId, SandboxSpec, new_sandbox_id
from tests.hub.backends.local.local_parts import SPEC, needs_isolation, under_test

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def memory() -> AsyncGenerator[BackendUnderTest]:
    def fail(spec: SandboxSpec) -> SandboxSpec:
        backend.fail_next()
        return spec

    async def die(sandbox_id: SandboxId) -> None:
        backend.die(sandbox_id)

    async def nothing() -> list[str]:
        return []

    async with MemoryBackend(said=b"up\n") as backend:
        yield BackendUnderTest(
            backend=backend, spec=SPEC, fail=fail, die=die, another=backend.another, leftovers=nothing
        )


def read_only() -> AbstractAsyncContextManager[BackendUnderTest]:
    return under_test(machine=False)


MAKERS: dict[str, Make] = {
    "memory": memory,
    "local": under_test,
    "local, read-only": read_only,
    "fork": partial(under_test, launcher="fork"),
    "fork, read-only": partial(under_test, launcher="fork", machine=False),
}
LOCAL = [pytest.param(name, marks=needs_isolation) for name in MAKERS if name != "memory"]


@pytest.fixture(params=["memory", LOCAL[0]])
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


WITH_ESCAPES = ("memory", "fork")
QUICK = [behaviour for behaviour in BEHAVIOURS if behaviour is not nothing_escapes]


@pytest.mark.parametrize("behaviour", QUICK, ids=lambda behaviour: behaviour.__name__)
async def test_backend_holds_to_its_contract(behaviour: Callable[[Make], Awaitable[None]], make: Make) -> None:
    try:
        await behaviour(make)
    except unittest.SkipTest as unshown:
        pytest.skip(str(unshown))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["memory", *LOCAL])
async def test_the_whole_suite_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in WITH_ESCAPES:  # `test_local_escapes` makes the attempts from each of them
        monkeypatch.setattr("ash_hub.testing.conformance.BEHAVIOURS", QUICK)
    await check_backend(MAKERS[name])


async def test_check_backend_notices_a_backend_that_lies() -> None:
    class Forgetful(MemoryBackend):
        async def annotate(self, sandbox_id: SandboxId, record: object, *, revision: int) -> None:
            pass

    @asynccontextmanager
    async def forgetful() -> AsyncGenerator[BackendUnderTest]:
        async with memory() as it:
            yield replace(it, backend=Forgetful())

    with pytest.raises(AssertionError):
        await check_backend(forgetful)


async def test_a_slow_watcher_is_told_to_list_again_and_nothing_grows() -> None:
    async with MemoryBackend() as backend:
        events = backend.watch()
        for _ in range(700):
            created = await backend.create(replace(SPEC, id=new_sandbox_id()))
            await backend.delete(created.id)
        assert await anext(events) == BackendEvent(None, lost=True)
        created = await backend.create(replace(SPEC, id=new_sandbox_id()))
        after = [await anext(events)]
        while after[-1].instance != created:
            after.append(await anext(events))
        assert len(after) < 1024
        assert after[-1].instance is not None and after[-1].instance.phase is Phase.RUNNING
