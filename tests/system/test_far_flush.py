"""Three hives on one Redis 200 ms away that is emptied: after a restart of all hives every sandbox is there with its
tools and its time limits, and no trace is left of those that ended with calls in flight."""

from __future__ import annotations

from typing import Any, Final

import anyio
import pytest

from tests.hub.backends.local.local_parts import needs_isolation
from tests.redis_server import RedisServer
from tests.system.far_redis import FarHive, Said, check_ends, far_hive

pytestmark = [pytest.mark.anyio, pytest.mark.redis, pytest.mark.heavy, needs_isolation]

ENDS: Final = 12
"""At once, each with a call in flight."""
PATIENCE: Final = 60.0
"""For one end, with all its repetitions."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("meanwhile", ["nothing", "flush", "closed", "silent"])
async def test_ends_with_calls_in_flight_leave_no_last_call_in_redis(redis: RedisServer, meanwhile: Any) -> None:
    async with far_hive(redis) as hive:
        made: dict[str, str] = {}
        over = anyio.Event()

        async def spawn(number: int) -> None:
            said = await hive.replicas[number % 3].tool("spawn", recipe="echo", session=f"box{number}")
            assert said.good, said
            made[f"box{number}"] = said.content["sandbox_id"]

        async def call(number: int) -> None:
            said = await hive.replicas[number % 3].tool(f"box{number}_slow", seconds=120, steps=1000)
            assert said.kind == "sandbox_gone" and said.failure is not None, said
            assert said.failure["data"]["reason"] == "destroyed", said

        async def end(number: int) -> None:
            await anyio.sleep(number * 0.09)  # so that they meet each moment of the second between two reports
            said = Said()
            with anyio.fail_after(PATIENCE):
                while not (said := await hive.replicas[(number + 1) % 3].tool("destroy", session=f"box{number}")).good:
                    assert said.may_be_repeated, said
            assert [box["sandbox_id"] for box in said.content["destroyed"] + said.content["already_ended"]] == [
                made[f"box{number}"]
            ]

        async def disturb() -> None:
            if meanwhile == "flush":
                redis.ask("FLUSHALL")
            elif meanwhile != "nothing":
                await hive.proxy.cut(meanwhile)
                await over.wait()
                await hive.proxy.heal()

        async with anyio.create_task_group() as spawning:
            for number in range(ENDS):
                spawning.start_soon(spawn, number)
        async with anyio.create_task_group() as calling:
            for number in range(ENDS):
                calling.start_soon(call, number)
            await anyio.sleep(2.0)
            calling.start_soon(disturb)
            await anyio.sleep(0.2)
            with anyio.move_on_after(6.0):
                async with anyio.create_task_group() as ending:
                    for number in range(ENDS):
                        ending.start_soon(end, number)
            over.set()
            async with anyio.create_task_group() as ending:
                for number in range(ENDS):
                    ending.start_soon(end, number)
        await hive.all_ready()
        await anyio.sleep(3)  # three reports of calls
        left = await hive.nothing_left(list(made.values()))
        assert not left, "\n".join(left)
        assert await check_ends(hive, list(made.values())) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_after_a_flush_and_a_restart_of_all_hives_every_sandbox_is_there_with_its_tools(
    redis: RedisServer, how: str
) -> None:
    async with far_hive(redis) as hive:
        made: dict[str, str] = {}
        limits: dict[str, dict[str, float]] = {"brief": {"ttl_seconds": 90}, "idle": {"idle_seconds": 75}}
        for number, (session, recipe) in enumerate(
            (("box0", "echo"), ("box1", "general"), ("box2", "echo"), ("brief", "echo"), ("idle", "echo"))
        ):
            replica = hive.replicas[number % 3]
            said = await replica.tool("spawn", recipe=recipe, session=session, **limits.get(session, {}))
            assert said.good, said
            made[session] = said.content["sandbox_id"]
        before = (await hive.replicas[1].list_tools()).result["tools"]
        expires = (await hive.replicas[2].sandboxes())[made["brief"]]["expires_at"]
        redis.ask("FLUSHALL")
        await restart(hive, how)
        await hive.all_ready()
        for replica in hive.replicas:
            listed = await replica.sandboxes()
            assert {box["session"]: name for name, box in listed.items()} == made
            assert listed[made["brief"]]["expires_at"] == expires
            assert (await replica.list_tools()).result["tools"] == before
            for session in ("box0", "box2", "brief"):
                said = await replica.tool(f"{session}_echo", text=session)
                assert said.good and said.content == {"text": session}, said
        await check_limits(hive, made)


async def restart(hive: FarHive, how: str) -> None:
    """Replace every replica: all killed at once, or stopped one after the other behind one that is new."""
    for replica in list(hive.replicas):
        if how == "killed":
            await hive.kill(replica)
        else:
            await hive.start()
            assert await hive.stop(replica) == 0
    while len(hive.replicas) < 3:
        await hive.start()


async def check_limits(hive: FarHive, made: dict[str, str]) -> None:
    """Check that each replica comes to know of the ends by time, and that nothing else ended."""
    wanted = {"brief": "ttl_expired", "idle": "idle_expired"}
    said: dict[str, str | None] = {}
    for replica in hive.replicas:
        with anyio.move_on_after(110):
            while {session: said.get(session) for session in wanted} != wanted:
                await anyio.sleep(0.5)
                told = await replica.sandboxes(ended=True)
                said = {session: told.get(made[session], {}).get("reason", "nothing") for session in made}
        assert said == {**dict.fromkeys(made), **wanted}
