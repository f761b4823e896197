"""The hub reads a sandbox's tool list within bounds, and beside the loop."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ash_hub.spawning import starting
from ash_hub.spawning.sandbox_requests import MAX_LIST_BYTES, MAX_LIST_VALUES
from ash_hub.spawning.toolsets import Toolset, pin
from ash_mcp.errors import StartFailed
from tests.hub.world import World

pytestmark = pytest.mark.anyio


def tool(**more: Any) -> dict[str, Any]:
    return {"name": "run", "inputSchema": {"type": "object"}, **more}


async def test_a_list_is_cleaned_beside_the_loop(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def pin_somewhere(*given: Any) -> Toolset:
        threads.append(threading.get_ident())
        return pin(*given)

    monkeypatch.setattr(starting, "pin", pin_somewhere)
    await world.spawn()
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ([tool(description="x" * MAX_LIST_BYTES)], f"larger than {MAX_LIST_BYTES} bytes"),
        ([tool(x=[1] * MAX_LIST_VALUES)], f"more than {MAX_LIST_VALUES} values"),
    ],
)
async def test_a_list_that_takes_too_long_to_read_is_not_read(world: World, listed: list[Any], says: str) -> None:
    world.runner.tools = listed
    with pytest.raises(StartFailed, match=says) as failed:
        await world.spawn()
    assert failed.value.data["step"] == "tools"


async def test_a_number_of_thousands_of_digits_costs_its_schema_alone(world: World) -> None:
    world.runner.tools = [tool(inputSchema={"type": "object", "maximum": 10**4000})]
    sandbox = await world.spawn()
    assert sandbox.toolset is not None
    assert [kept.input_schema for kept in sandbox.toolset.tools] == [{"type": "object"}]
    assert "was too large" in sandbox.warnings[-1]
