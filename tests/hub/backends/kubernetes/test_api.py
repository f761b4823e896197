"""The API client against a server on this host that answers in pieces."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.kubernetes import api as module
from ash_hub.backends.kubernetes.api import Api, open_api
from ash_mcp.errors import ConnectFailed

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def answering(folder: Path, *bodies: bytes, asked: list[str] | None = None) -> AsyncGenerator[Api]:
    """Connect to a server whose answers are these bodies, one after another, each sent in two pieces.

    Args:
        asked: Takes the first line of each request.
    """
    left = list(bodies)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(head.partition(b"\r\n")[0].decode())
        body = left.pop(0)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(body) + body[:10])
        await writer.drain()
        await asyncio.sleep(0.05)  # so that the client sees the first piece alone
        writer.write(body[10:])
        await writer.drain()
        writer.close()

    async with serving(folder, answer) as api:
        yield api


@asynccontextmanager
async def serving(
    folder: Path, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> AsyncGenerator[Api]:
    """Connect to a server that answers each connection so."""
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        named: dict[str, Any] = {
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "n"}}],
            "current-context": "x",
        }
        kubeconfig = folder / "config"
        kubeconfig.write_text(json.dumps(named))
        async with open_api(kubeconfig, None) as api:
            yield api


async def test_an_answer_that_comes_in_pieces_is_read_to_its_end(tmp_path: Path) -> None:
    body = {"data": "x" * 2_000_000}
    async with answering(tmp_path, json.dumps(body).encode()) as api:
        assert await api.get("/api/v1/namespaces/n/configmaps/c") == body


async def test_an_event_of_the_largest_size_is_read(tmp_path: Path) -> None:
    event = {"type": "ADDED", "object": {"data": "x" * 600_000}}
    async with answering(tmp_path, json.dumps(event).encode() + b"\n") as api, api.watch("/api/v1/pods") as events:
        assert [found async for found in events] == [event]


@asynccontextmanager
async def busy(folder: Path, *pauses: str) -> AsyncGenerator[tuple[Api, list[float]]]:
    """Connect to a server that is too busy so many times; when it was asked is in the list."""
    asked: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\n"
        if len(asked) < len(pauses):
            head = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: %s\r\n" % pauses[len(asked)].encode()
        asked.append(time.monotonic())
        writer.write(head + b"connection: close\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with serving(folder, answer) as api:
        yield api, asked


async def test_a_server_that_is_too_busy_is_left_alone_for_as_long_as_it_says(tmp_path: Path) -> None:
    async with busy(tmp_path, "1") as (api, asked):
        assert await api.create("/api/v1/namespaces/n/pods", {}) == {}
    assert len(asked) == 2 and asked[1] - asked[0] >= 1.0


async def test_a_server_that_wants_a_long_pause_is_not_asked_again(tmp_path: Path) -> None:
    async with busy(tmp_path, "60") as (api, asked):
        with pytest.raises(ConnectFailed, match="cannot do it now") as failure:
            await api.create("/api/v1/namespaces/n/pods", {})
    assert failure.value.retryable and failure.value.data["retry_after_seconds"] == 60 and len(asked) == 1


async def test_a_watch_that_does_not_begin_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEAD_SECONDS", 0.1)
    is_over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await is_over.wait()
        writer.close()

    async with serving(tmp_path, answer) as api, asyncio.timeout(5):
        with pytest.raises(ConnectFailed, match="does not answer"):
            async with api.watch("/api/v1/pods"):
                pass
        is_over.set()


async def test_a_collection_is_read_page_by_page(tmp_path: Path) -> None:
    pages = [{"metadata": {"continue": "next"}, "items": [1]}, {"metadata": {"continue": ""}, "items": [2]}]
    asked: list[str] = []
    async with answering(tmp_path, *(json.dumps(page).encode() for page in pages), asked=asked) as api:
        assert [page async for page in api.pages("/api/v1/pods", labelSelector="a")] == pages
    assert asked == [
        "GET /api/v1/pods?labelSelector=a&limit=200 HTTP/1.1",
        "GET /api/v1/pods?labelSelector=a&limit=200&continue=next HTTP/1.1",
    ]
