"""When the runner's HTTP server is told to end: before it serves, while it serves, and after."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any, cast

import pytest
from sse_starlette.sse import AppStatus

from ash_recipes.runner.app import RunnerApp
from ash_recipes.runner.context import Context, Environment
from ash_recipes.runner.service import Http


class NoApp:
    """Serves nothing, and admits nobody."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    admits: Any = None


def _nothing(*_: Any) -> None: ...


@pytest.fixture
def http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Http:
    """A server whose signals set no timer: that would end the tests."""
    # sse-starlette hears of uvicorn's signals, and would end all streams of this process from then on
    monkeypatch.setattr(AppStatus, "should_exit", False)
    for name in ("signal", "setitimer"):
        monkeypatch.setattr(signal, name, _nothing)
    context = Context(workspace=tmp_path, home=tmp_path, environment=Environment({}))
    return Http(cast("RunnerApp", NoApp()), context)


async def _waits(http: Http) -> asyncio.Task[None]:
    waiting = asyncio.create_task(http.main_loop())
    await asyncio.sleep(0)
    return waiting


@pytest.mark.parametrize("how", ["end", "signal"])
@pytest.mark.parametrize("when", ["before", "while"])
def test_it_ends_whenever_it_is_told(http: Http, how: str, when: str) -> None:
    def tell() -> None:
        http.end() if how == "end" else http.handle_exit(signal.SIGTERM, None)

    async def serve() -> None:
        if when == "before":
            tell()
        waiting = await _waits(http)
        if when == "while":
            assert not waiting.done()
            tell()
        async with asyncio.timeout(5):
            await waiting

    asyncio.run(serve())


def test_a_further_signal_does_no_harm_after_its_loop_has_ended(http: Http) -> None:
    async def serve() -> None:
        waiting = await _waits(http)
        http.handle_exit(signal.SIGTERM, None)
        await waiting

    asyncio.run(serve())
    http.handle_exit(signal.SIGTERM, None)
