"""A stream of a guest ends with its share, and by itself as any other."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from ash_router.sessions import guest_streams
from ash_router.sessions.guest_streams import serve_while

pytestmark = pytest.mark.anyio

START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}
PART: dict[str, Any] = {"type": "http.response.body", "body": b"x", "more_body": True}
END: dict[str, Any] = {"type": "http.response.body", "body": b"", "more_body": False}


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """Send a part and then listen until the client has left."""
    del scope
    await send(START)
    await send(PART)
    while (await receive())["type"] != "http.disconnect":
        pass


async def never() -> Any:
    await anyio.sleep_forever()


async def test_the_app_takes_its_client_for_gone_and_the_answer_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guest_streams, "LOOK_SECONDS", 0.001)
    looks: list[bool] = []
    sent: list[Any] = []

    def is_good() -> bool:
        looks.append(len(looks) < 3)
        return looks[-1]

    async def send(message: Any) -> None:
        sent.append(message)

    with anyio.fail_after(5):
        await serve_while(is_good, stream, {}, never, send)
    assert (sent, looks) == ([START, PART, END], [True, True, True, False])


async def test_what_comes_from_the_client_reaches_the_app():
    waiting: list[dict[str, Any]] = [{"type": "http.request"}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    with anyio.fail_after(5):
        await serve_while(lambda: True, stream, {}, receive, send)
    assert (sent, waiting) == ([START, PART], [])


async def test_an_answer_that_is_complete_is_not_ended_again():
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope, receive
        await send(START)
        await send(END)

    async def send(message: Any) -> None:
        sent.append(message)

    with anyio.fail_after(5):
        await serve_while(lambda: False, app, {}, never, send)
    assert sent == [START, END]
