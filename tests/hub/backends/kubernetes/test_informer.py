"""A collection is followed over everything that can happen to a watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest

from ash_hub.backends.kubernetes import informer as module
from ash_hub.backends.kubernetes.api import Api, ApiRefusal, Json
from ash_hub.backends.kubernetes.informer import Informer
from ash_mcp.errors import ConnectFailed

pytestmark = pytest.mark.anyio

PATH = "/api/v1/namespaces/n/pods"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def pod(name: str, version: int) -> Json:
    return {"metadata": {"name": name, "uid": name, "resourceVersion": str(version)}}


class Played:
    """Plays lists and watches in the order of a script; what is an error is raised. Its end is silence."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.asked: list[str] = []
        self.over = asyncio.Event()

    async def pages(self, path: str, **query: str) -> AsyncGenerator[Json]:
        assert path == PATH and query == {"labelSelector": "a=b"}
        self.asked.append("list")
        found: Any = await self._next()
        pages = cast("list[Any]", found) if isinstance(found, list) else [found]
        for page in pages:
            if isinstance(page, Exception):
                raise page
            yield page

    @asynccontextmanager
    async def watch(self, path: str, **query: str) -> AsyncGenerator[AsyncGenerator[Json]]:
        assert path == PATH and query["labelSelector"] == "a=b"
        self.asked.append(f"watch {query['resourceVersion']}")
        yield self._events(await self._next())

    async def _events(self, events: Any) -> AsyncGenerator[Json]:
        for event in events:
            await asyncio.sleep(0)
            if isinstance(event, Exception):
                raise event
            yield event

    async def _next(self) -> Any:
        await asyncio.sleep(0)
        if not self.script:
            self.over.set()
            await asyncio.Event().wait()
        found = self.script.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def listing(version: int, *pods: Json) -> Json:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(pods)}


def event(kind: str, found: Json) -> Json:
    return {"type": kind, "object": found}


async def heard(played: Played, changed: Callable[[str, Json], None] | None = None) -> tuple[list[str], Informer]:
    """Follow until the script is over; return what was told."""
    told: list[str] = []

    def take(kind: str, found: Json) -> None:
        if changed is not None:
            changed(kind, found)
        told.append(f"{kind} {found['metadata']['name']}")

    informer = Informer(
        cast("Api", played),
        PATH,
        {"labelSelector": "a=b"},
        lambda uids, version: told.append(f"listed {sorted(uids)} at {version}"),
        take,
    )
    following = asyncio.create_task(informer.run())
    async with asyncio.timeout(10):
        await played.over.wait()
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    return told, informer


async def test_a_watch_that_ends_goes_on_where_it_was() -> None:
    played = Played(
        listing(5, pod("a", 3)),
        [event("ADDED", pod("b", 6)), event("BOOKMARK", pod("", 9))],
        [event("DELETED", pod("a", 10))],
    )
    told, _ = await heard(played)
    assert told == ["ADDED a", "listed ['a'] at 5", "ADDED b", "DELETED a"]
    assert played.asked == ["list", "watch 5", "watch 9", "watch 10"]


@pytest.mark.parametrize(
    "gone", [ApiRefusal(410, {"message": "too old"}), [ApiRefusal(410, {"message": "too old"})]], ids=["head", "event"]
)
async def test_what_is_too_old_is_listed_again(gone: Any) -> None:
    played = Played(listing(5), gone, listing(8, pod("a", 7)))
    told, _ = await heard(played)
    assert told == ["listed [] at 5", "ADDED a", "listed ['a'] at 8"]


@pytest.mark.parametrize("at", ["list", "watch", "event"])
async def test_an_api_server_that_is_away_is_asked_again_and_nothing_is_told_twice(at: str) -> None:
    away = ConnectFailed("the Kubernetes API does not answer: gone")
    played = {
        "list": Played(away, away, listing(5)),
        "watch": Played(listing(5), away),
        "event": Played(listing(5), [away]),
    }[at]
    told, informer = await heard(played)
    assert told == ["listed [] at 5"]
    assert played.asked[-1] == "watch 5"
    assert informer.problem == away.message  # until a watch answers


async def test_it_says_that_it_hears_again() -> None:
    played = Played(ConnectFailed("gone"), listing(5), [])
    _, informer = await heard(played)
    assert informer.problem is None and informer.synced.is_set()


async def test_an_object_that_cannot_be_understood_is_that_objects_alone() -> None:
    def changed(kind: str, found: Json) -> None:
        if found["metadata"]["name"] == "bad":
            raise ValueError("what is this?")

    played = Played(listing(5), [event("ADDED", pod("bad", 6)), event("ADDED", pod("b", 7))])
    told, _ = await heard(played, changed)
    assert told == ["listed [] at 5", "ADDED b"]
    assert played.asked == ["list", "watch 5", "watch 7"]


async def test_an_answer_that_is_no_list_does_not_end_the_following() -> None:
    played = Played({"kind": "Status"}, listing(5))
    told, _ = await heard(played)
    assert told == ["listed [] at 5"]


async def test_a_server_that_is_too_busy_is_left_alone_for_as_long_as_it_says() -> None:
    began = time.monotonic()
    played = Played(ConnectFailed("too busy", retry_after_seconds=0.4), listing(5))
    await heard(played)
    assert time.monotonic() - began >= 0.4


async def test_a_watch_that_is_doubted_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DOUBT_SECONDS", 0.0)

    async def silence() -> AsyncGenerator[Json]:
        await asyncio.Event().wait()
        yield {}

    class Silent(Played):
        async def _events(self, events: Any) -> AsyncGenerator[Json]:
            async for each in events:
                yield each

    played = Silent(listing(5), silence())
    informer = Informer(cast("Api", played), PATH, {"labelSelector": "a=b"}, lambda _, __: None, lambda _, __: None)
    following = asyncio.create_task(informer.run())
    async with asyncio.timeout(10):
        await informer.synced.wait()
        await asyncio.sleep(0.01)
        assert played.asked == ["list", "watch 5"]
        informer.doubt()
        await played.over.wait()
    assert played.asked == ["list", "watch 5", "watch 5"]
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following


async def test_a_list_in_pages_is_told_as_one_and_begun_again_when_it_breaks_off() -> None:
    pages = [listing(5, pod("a", 3)), listing(5, pod("b", 4))]
    played = Played([pages[0], ApiRefusal(410, {"message": "too old"})], pages)
    told, _ = await heard(played)
    assert told == ["ADDED a", "ADDED a", "ADDED b", "listed ['a', 'b'] at 5"]
    assert played.asked == ["list", "list", "watch 5"]
