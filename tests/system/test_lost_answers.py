"""Answers that are lost on the way from a real hive: what was asked for is done once, and its answer comes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import anyio
import httpx
import pytest

from ash_mcp import Hive

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

MANY = 200


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class LossyTransport(httpx.AsyncHTTPTransport):
    """Loses the first answer of every call of `ash_exec`, after it has come whole."""

    def __init__(self) -> None:
        super().__init__(limits=httpx.Limits(max_connections=MANY))
        self.lost: set[str] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        asked: dict[str, Any] = json.loads(request.content)["params"]["arguments"]
        if asked.get("tool") != "ash_exec" or (key := asked["arguments"]["key"]) in self.lost:
            return response
        self.lost.add(key)
        await response.aread()
        await response.aclose()
        raise httpx.ReadError("the answer was lost", request=request)


async def test_two_hundred_commands_at_once_whose_answers_are_lost_run_once_each(hive_url: str) -> None:
    transport, answers = LossyTransport(), dict[int, str]()

    async with Hive(hive_url, transport=transport) as hive, hive.spawn("echo") as box:

        async def run(number: int) -> None:
            answers[number] = (await box.exec(f"echo {number} | tee -a runs")).stdout

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for number in range(MANY):
                    group.start_soon(run, number)
        runs = Counter((await box.files.read("runs")).split())
    assert len(transport.lost) == MANY
    assert runs == {str(number): 1 for number in range(MANY)}
    assert answers == {number: f"{number}\n" for number in range(MANY)}
