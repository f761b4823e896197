"""A caller that waits for a tool of the hive hears of it again and again."""

from __future__ import annotations

import re
import time
from typing import Any

import anyio
import pytest

from ash_hub.face.steady_progress import SteadyProgress, comment_on, with_comments

pytestmark = pytest.mark.anyio


async def test_what_was_reported_last_is_told_again_and_grows() -> None:
    told: list[tuple[float, str | None]] = []
    enough = anyio.Event()

    async def report(done: float, total: float | None, message: str | None) -> None:
        assert total == 1.0
        told.append((done, message))
        if len(told) == 4:
            enough.set()

    progress, began = SteadyProgress(report, quiet_seconds=0.01), time.monotonic()
    with anyio.fail_after(60):
        async with progress.repeated():
            await progress(0.3, "starting")
            await enough.wait()
    assert told[0] == (0.3, "starting")
    said = re.fullmatch(r"starting, after (\d+) s", told[1][1] or "")
    assert said is not None and int(said[1]) <= time.monotonic() - began
    numbers = [done for done, _ in told]
    assert numbers == sorted(set(numbers)) and numbers[-1] < 0.8


async def test_nothing_is_told_after_the_end() -> None:
    told: list[float] = []

    async def report(done: float, total: float | None, message: str | None) -> None:
        told.append(done)

    async with SteadyProgress(report, quiet_seconds=0.02).repeated():
        pass
    await anyio.sleep(0.1)
    assert told == []


JSON: dict[str, Any] = {
    "type": "http.response.start",
    "status": 404,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")],
}
STREAM: dict[str, Any] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"Content-Type", b"text/event-stream; charset=utf-8")],
}
COMMENT = {"type": "http.response.body", "body": b": the call goes on\n\n", "more_body": True}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def answered(*parts: dict[str, Any] | None) -> tuple[list[Any], dict[str, Any]]:
    """Return what a caller gets of an answer in which None stands for a comment, and the scope of its request."""
    sent, seen = list[Any](), list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        for part in parts:
            await (comment_on(scope) if part is None else send(part))

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    await with_comments(app)({"type": "http", "method": "POST"}, receive, send)
    return sent, seen[0]


async def test_an_answer_in_json_becomes_the_event_of_a_stream_that_a_comment_began() -> None:
    (start, *rest), _ = await answered(None, None, JSON, body(b"{}"))
    assert start["status"] == 200 and (b"content-type", b"text/event-stream") in start["headers"]
    assert rest == [COMMENT, COMMENT, body(b"event: message\ndata: {}\n\n")]


async def test_a_stream_goes_on_in_the_one_that_a_comment_began() -> None:
    (_, *rest), _ = await answered(None, STREAM, body(b"data: 1\n\n", more=True), None, body(b"data: 2\n\n"))
    assert rest == [COMMENT, body(b"data: 1\n\n", more=True), COMMENT, body(b"data: 2\n\n")]


async def test_no_comment_comes_into_json_or_after_the_end() -> None:
    for parts in ([JSON, None, body(b"{}")], [STREAM, body(b"data: 1\n\n"), None]):
        sent, _ = await answered(*parts)
        assert sent == [part for part in parts if part is not None]
    sent, scope = await answered(STREAM)  # whose caller has left
    await comment_on(scope)
    assert sent == [STREAM]
