"""What one principal holds of the hive's own endpoint is bounded, and leaves the others theirs."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.admission import ADMITTED_KEY, Admitted
from ash_router.sessions import INITIALIZE_KEY
from ash_router.shares import Shares

pytestmark = pytest.mark.anyio


class Endpoint:
    """Gives every `initialize` a session, and keeps what is not one open until it is told to end."""

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.given = 0
        self.over = anyio.Event()
        self.open = 0

    def alive(self, session_id: str) -> bool:
        return session_id not in self.ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        del receive
        headers: list[tuple[bytes, bytes]] = []
        if INITIALIZE_KEY in scope:
            self.given += 1
            headers = [(b"Mcp-Session-Id", b"s%d" % self.given)]
        else:
            self.open += 1
            await self.over.wait()
            self.open -= 1
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


async def ask(shares: Shares, who: str, *, opens: bool = False) -> tuple[int, dict[bytes, bytes], dict[str, Any]]:
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        said.append(message)

    scope: dict[str, Any] = {"type": "http", ADMITTED_KEY: Admitted(Principal(who), DEFAULT_SCOPE, "/mcp")}
    await shares({**scope, **({INITIALIZE_KEY: {}} if opens else {})}, receive, send)
    return said[0]["status"], dict(said[0]["headers"]), json.loads(said[1]["body"])


@asynccontextmanager
async def holding(shares: Shares, endpoint: Endpoint, who: str, count: int) -> AsyncGenerator[None]:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(ask, shares, who)
            await anyio.wait_all_tasks_blocked()
            assert endpoint.open == count
            yield
            endpoint.over.set()


async def test_open_requests_of_one_principal_are_bounded_and_anothers_are_not() -> None:
    endpoint = Endpoint()
    shares = Shares(endpoint, endpoint.alive, max_open=3)
    async with holding(shares, endpoint, "ann", 3):
        for opens in (False, True):
            status, headers, body = await ask(shares, "ann", opens=opens)
            assert (status, headers[b"retry-after"]) == (429, b"1")
            assert (body["error"]["kind"], body["error"]["retryable"]) == ("capacity_exceeded", True)
            assert body["error"]["data"] == {"retry_after_seconds": 1.0}
        assert (await ask(shares, "bob", opens=True))[0] == 200
    assert (await ask(shares, "ann"))[0] == 200


async def test_sessions_of_one_principal_are_bounded_and_an_ended_one_makes_room() -> None:
    endpoint = Endpoint()
    shares = Shares(endpoint, endpoint.alive, max_sessions=3)
    assert [(await ask(shares, "ann", opens=True))[0] for _ in range(4)] == [200, 200, 200, 429]
    assert (await ask(shares, "bob", opens=True))[0] == 200
    endpoint.ended.add("s2")
    assert [(await ask(shares, "ann", opens=True))[0] for _ in range(2)] == [200, 429]


async def test_a_request_that_breaks_off_gives_its_place_back() -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("gone")

    shares = Shares(breaks, lambda _: True, max_open=1)
    for _ in range(3):
        with pytest.raises(OSError, match="gone"):
            await ask(shares, "ann")
