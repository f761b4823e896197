"""What a spawn costs, measured with a real hive."""

from __future__ import annotations

import pytest

from ash_hub.bench.spawning import measure_spawn_cost
from tests.hub.backends.local.local_parts import needs_isolation

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_each_spawn_and_each_process_is_a_sample_in_order() -> None:
    steps: list[str] = []
    cost = await measure_spawn_cost(3, processes=2, step=steps.append)
    assert (len(cost.ready), len(cost.called), len(cost.process)) == (3, 3, 2)
    assert cost.called == sorted(cost.called) and cost.ready[0] < cost.called[-1]
    assert cost.processor > 0 and cost.process_processor > 0
    assert len(steps) == 5
