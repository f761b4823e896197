"""The answers to `spawn` and `destroy` come after the caller's own client has fetched the new list, in both eras."""

from __future__ import annotations

import math
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import mcp_types as types
import pytest
from mcp.client import Client

from tests.hive_process import hive_in

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

HELD_SECONDS = 0.2
"""How long the client of these tests leaves the news alone."""
BOUND_SECONDS = 10.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def patient_url() -> Iterator[str]:
    """The URL of a hive that waits long for who listens."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as home:
        patch.setenv("ASH_HUB_LIST_FETCH_SECONDS", f"{BOUND_SECONDS:g}")
        with hive_in(Path(home)) as (url, _):
            yield url


@asynccontextmanager
async def following(url: str, era: str) -> AsyncGenerator[tuple[Client, AsyncIterator[Any]]]:
    """Connect a client that listens, and yield it with the changes that it is told of."""
    send, receive = anyio.create_memory_object_stream[Any](math.inf)

    async def hear(message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            send.send_nowait(message)

    async with (
        send,
        receive,
        Client(url, mode="legacy" if era == "legacy" else "auto", message_handler=hear) as client,
    ):
        if era == "legacy":
            yield client, receive
        else:
            async with client.listen(tools_list_changed=True) as subscription:
                yield client, aiter(subscription)


@pytest.mark.parametrize("era", ["legacy", "2026-07-28"])
async def test_spawn_and_destroy_answer_when_their_client_has_the_list(patient_url: str, era: str) -> None:
    async with following(patient_url, era) as (client, changes), anyio.create_task_group() as group:

        async def told_before(call: Callable[[], Awaitable[Any]]) -> tuple[list[str], Any]:
            """Make a call that changes the list, and return the list that was fetched before its answer."""
            answers: list[Any] = []

            async def ask() -> None:
                answers.append(await call())

            group.start_soon(ask)
            await anext(changes)
            await anyio.sleep(HELD_SECONDS)
            assert not answers
            names = [tool.name for tool in (await client.list_tools()).tools]
            with anyio.fail_after(BOUND_SECONDS / 2):
                while not answers:
                    await anyio.sleep(0.01)
            return names, answers[0].structured_content

        await client.call_tool("list", {})
        with anyio.fail_after(60):
            shown, spawned = await told_before(lambda: client.call_tool("spawn", {"recipe": "echo"}))
            assert f"{spawned['session']}_echo" in shown
            ended = {"session": spawned["session"]}
            shown, _ = await told_before(lambda: client.call_tool("destroy", ended))
            assert f"{spawned['session']}_echo" not in shown
        with anyio.move_on_after(HELD_SECONDS):
            raise AssertionError(f"one change was told twice: {await anext(changes)}")
