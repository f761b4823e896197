"""What one principal holds open at the hive's own endpoint is bounded, and leaves the others theirs."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.sessions.quotas import OpenRequestQuotas

pytestmark = pytest.mark.anyio


class Endpoint:
    """Keeps each request open until it is told to end."""

    def __init__(self) -> None:
        self.over = anyio.Event()
        self.open = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        del scope, receive
        self.open += 1
        await self.over.wait()
        self.open -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def ask(quotas: OpenRequestQuotas, who: str) -> tuple[int, dict[bytes, bytes], dict[str, Any]]:
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        said.append(message)

    scope: dict[str, Any] = {"type": "http", ADMITTED_KEY: Admitted(Principal(who), DEFAULT_SCOPE, "/mcp")}
    await quotas(scope, receive, send)
    return said[0]["status"], dict(said[0]["headers"]), json.loads(said[1]["body"])


@asynccontextmanager
async def holding(quotas: OpenRequestQuotas, endpoint: Endpoint, who: str, count: int) -> AsyncGenerator[None]:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(ask, quotas, who)
            await anyio.wait_all_tasks_blocked()
            assert endpoint.open == count
            yield
            endpoint.over.set()


async def test_open_requests_of_one_principal_are_bounded_and_anothers_are_not() -> None:
    endpoint = Endpoint()
    quotas = OpenRequestQuotas(endpoint, max_open=3)
    async with holding(quotas, endpoint, "ann", 3), anyio.create_task_group() as group:
        status, headers, body = await ask(quotas, "ann")
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert (body["error"]["kind"], body["error"]["retryable"]) == ("capacity_exceeded", True)
        assert body["error"]["data"] == {"limit": "owner", "retry_after_seconds": 1.0}
        group.start_soon(ask, quotas, "bob")
        await anyio.wait_all_tasks_blocked()
        assert endpoint.open == 4
        endpoint.over.set()
    assert (await ask(quotas, "ann"))[0] == 200


async def test_a_request_that_breaks_off_gives_its_place_back() -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("gone")

    quotas = OpenRequestQuotas(breaks, max_open=1)
    for _ in range(3):
        with pytest.raises(OSError, match="gone"):
            await ask(quotas, "ann")
