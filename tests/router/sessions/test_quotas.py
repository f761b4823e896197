"""What one principal holds open at the hive's own endpoint is bounded, and leaves the others theirs."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest

from ash_mcp.types import DEFAULT_SCOPE, Principal, PrincipalLimits
from ash_router.admission.base import ADMITTED_KEY, Admitted
from ash_router.bounds.limits import RelayLimits
from ash_router.bounds.streams import OpenStreams
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


LISTENING: dict[str, dict[str, Any]] = {
    "GET": {"method": "GET"},
    "subscriptions/listen": {"headers": [(b"mcp-method", b"subscriptions/listen")]},
}
"""The requests that only listen, of both eras."""


def quotas_of(app: Any, *, max_open: int = 9, max_streams: int = 9) -> OpenRequestQuotas:
    return OpenRequestQuotas(app, OpenStreams(), RelayLimits(max_streams_per_owner=max_streams), max_open=max_open)


async def ask(
    quotas: OpenRequestQuotas, who: str | Principal, **more: Any
) -> tuple[int, dict[bytes, bytes], dict[str, Any]]:
    said: list[Any] = []
    principal = Principal(who) if isinstance(who, str) else who

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        said.append(message)

    admitted = Admitted(principal, DEFAULT_SCOPE, "/mcp")
    await quotas({"type": "http", "method": "POST", "headers": [], ADMITTED_KEY: admitted, **more}, receive, send)
    return said[0]["status"], dict(said[0]["headers"]), json.loads(said[1]["body"])


@asynccontextmanager
async def holding(
    quotas: OpenRequestQuotas, endpoint: Endpoint, who: str, count: int, **more: Any
) -> AsyncGenerator[None]:
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(partial(ask, quotas, who, **more))
            await anyio.wait_all_tasks_blocked()
            assert endpoint.open == count
            yield
            endpoint.over.set()


async def test_open_requests_of_one_principal_are_bounded_and_anothers_are_not() -> None:
    endpoint = Endpoint()
    quotas = quotas_of(endpoint, max_open=3)
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


@pytest.mark.parametrize("way", LISTENING)
async def test_listen_streams_of_one_principal_are_bounded_and_anothers_are_not(way: str) -> None:
    endpoint = Endpoint()
    quotas = quotas_of(endpoint, max_open=0, max_streams=2)
    async with holding(quotas, endpoint, "ann", 2, **LISTENING[way]), anyio.create_task_group() as group:
        for other in LISTENING.values():
            status, headers, body = await ask(quotas, "ann", **other)
            assert (status, headers[b"retry-after"]) == (429, b"1")
            assert body["error"]["data"] == {"limit": "owner", "retry_after_seconds": 1.0}
            assert "2 streams open" in body["error"]["message"] and "STREAMS_PER_OWNER" in body["error"]["message"]
        group.start_soon(partial(ask, quotas, "bob", **LISTENING[way]))
        await anyio.wait_all_tasks_blocked()
        assert endpoint.open == 3
        endpoint.over.set()
    assert (await ask(quotas, "ann", **LISTENING[way]))[0] == 200


async def test_a_key_narrows_its_owners_listen_streams() -> None:
    quotas = quotas_of(Endpoint())
    status, _, body = await ask(quotas, Principal("ann", limits=PrincipalLimits(streams=0)), method="GET")
    assert status == 429 and body["error"]["data"]["limit"] == "key" and "--max-streams" in body["error"]["message"]


async def test_listen_streams_take_no_place_of_other_requests() -> None:
    endpoint = Endpoint()
    quotas = quotas_of(endpoint, max_open=1)
    async with holding(quotas, endpoint, "ann", 2, method="GET"), anyio.create_task_group() as group:
        group.start_soon(ask, quotas, "ann")
        await anyio.wait_all_tasks_blocked()
        assert endpoint.open == 3
        endpoint.over.set()


@pytest.mark.parametrize("more", [{}, *LISTENING.values()], ids=["request", *LISTENING])
async def test_a_request_that_breaks_off_gives_its_place_back(more: dict[str, Any]) -> None:
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        raise OSError("gone")

    quotas = quotas_of(breaks, max_open=1, max_streams=1)
    for _ in range(3):
        with pytest.raises(OSError, match="gone"):
            await ask(quotas, "ann", **more)


@pytest.mark.parametrize("more", [{}, *LISTENING.values()], ids=["request", *LISTENING])
async def test_a_request_that_is_cancelled_gives_its_place_back(more: dict[str, Any]) -> None:
    endpoint = Endpoint()
    quotas = quotas_of(endpoint, max_open=1, max_streams=1)
    async with anyio.create_task_group() as group:
        group.start_soon(partial(ask, quotas, "ann", **more))
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    endpoint.over.set()
    assert (await ask(quotas, "ann", **more))[0] == 200
