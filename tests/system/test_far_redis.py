"""Three hives on one Redis 200 ms away that is cut off for seconds while sandboxes come and go: no hive ends, no
sandbox that lives is missed, none that ended is left, and whoever was refused was told so."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import pytest

from tests.delaying_proxy import Cut
from tests.hub.backends.local.local_parts import needs_isolation
from tests.redis_server import RedisServer
from tests.system.far_redis import FarHive, Replica, Said, check_ends, far_hive

pytestmark = [pytest.mark.anyio, pytest.mark.redis, needs_isolation]

CUTS: Final[tuple[tuple[float, Cut], ...]] = ((6.0, "closed"), (6.0, "silent"), (10.0, "silent"), (10.0, "closed"))
BETWEEN_CUTS: Final = 6.0
WORKERS: Final = 6
STAYING: Final = 3
PATIENCE: Final = 60.0
"""For one step of a sandbox's life, with all its repetitions."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Churn:
    """Sandboxes come and go through replicas in turn, while others stay and are called and listed."""

    hive: FarHive
    lives: int
    seconds: float
    """After which no further life begins."""
    wrong: list[str] = field(default_factory=list[str])
    kinds: Counter[str] = field(default_factory=Counter[str])
    ended: list[str] = field(default_factory=list[str])
    """Ids of sandboxes that were destroyed."""
    cutting: bool = True
    staying: dict[str, str] = field(default_factory=dict[str, str])
    """Session -> id."""

    async def run(self) -> None:
        for number in range(STAYING):
            await self._spawn(f"stay{number}", number)
        until = time.monotonic() + self.seconds
        numbers = iter(range(self.lives))
        async with anyio.create_task_group() as beside:
            for number, replica in enumerate(self.hive.replicas):
                beside.start_soon(self._list_without_end, replica)
                beside.start_soon(self._call_without_end, number)
            async with anyio.create_task_group() as work:
                work.start_soon(self._cut)
                for _ in range(WORKERS):
                    work.start_soon(self._live, numbers, until)
            beside.cancel_scope.cancel()
        for number, session in enumerate(self.staying):
            await self._destroy(session, self.staying[session], number)

    # -- the work

    async def _live(self, numbers: Any, until: float) -> None:
        while self.cutting or time.monotonic() < until:
            number = next(numbers, None)
            if number is None:
                return
            session = f"box{number}"
            made = await self._spawn(session, number)
            if made is not None:
                await self._call(session, number + 1)
                await self._destroy(session, made, number + 2)

    async def _spawn(self, session: str, turn: int) -> str | None:
        wanted = {"recipe": "echo", "session": session, "idempotency_key": session}
        said = await self._until_good(f"spawn {session}", turn, lambda r: r.tool("spawn", **wanted))
        if said is None:
            return None
        made = str(said.content["sandbox_id"])
        if session.startswith("stay"):
            self.staying[session] = made
        return made

    async def _call(self, session: str, turn: int) -> None:
        said = await self._until_good(f"call {session}", turn, lambda r: r.tool(f"{session}_echo", text=session))
        if said is not None and said.content != {"text": session}:
            self.wrong.append(f"call {session}: {said}")

    async def _destroy(self, session: str, made: str, turn: int) -> None:
        """End a sandbox. Where the first try failed as retryable it may have ended nevertheless."""
        said = await self._until_good(f"destroy {session}", turn, lambda r: r.tool("destroy", session=made))
        if said is None:
            return
        named = [box["sandbox_id"] for box in (*said.content["destroyed"], *said.content["already_ended"])]
        if named == [made]:
            self.ended.append(made)
        else:
            self.wrong.append(f"destroy {session} ({made}): {said.content}")

    async def _until_good(self, what: str, turn: int, ask: Callable[[Replica], Awaitable[Said]]) -> Said | None:
        """Ask one replica after the other as long as each says that the same may succeed later."""
        said = Said(untyped="never asked")
        with anyio.move_on_after(PATIENCE):
            for replica in itertools.islice(itertools.cycle(self.hive.replicas), turn % 3, None):
                said = await ask(replica)
                self.kinds[f"{what.split()[0]}: {said.kind}"] += 1
                if said.good:
                    return said
                if not said.may_be_repeated:
                    break
                await anyio.sleep(0.3)
        self.wrong.append(f"{what}: {said}")
        return None

    # -- beside it

    async def _call_without_end(self, turn: int) -> None:
        for number in itertools.count():
            session = f"stay{number % STAYING}"
            if session in self.staying:
                await self._call(session, turn)
            await anyio.sleep(0.1)

    async def _list_without_end(self, replica: Replica) -> None:
        while True:
            said = await replica.list_tools()
            self.kinds[f"tools/list: {said.kind}"] += 1
            if said.good:
                names = {tool["name"] for tool in said.result["tools"]}
                missing = [session for session in self.staying if f"{session}_echo" not in names]
                self.wrong += [f"{session} is not listed" for session in missing]
            elif not said.may_be_repeated:
                self.wrong.append(f"tools/list: {said}")
            await anyio.sleep(0.5)

    async def _cut(self) -> None:
        try:
            for seconds, how in CUTS:
                await anyio.sleep(BETWEEN_CUTS)
                await self.hive.proxy.cut(how)
                await anyio.sleep(seconds)
                await self.hive.proxy.heal()
                await self.hive.all_ready()
        except TimeoutError:
            self.wrong.append(f"a replica was not ready again after a cut; ended: {self.hive.ended_replicas()}")
        self.cutting = False


@pytest.mark.parametrize(
    ("lives", "seconds"),
    [
        pytest.param(200, 170.0, marks=[pytest.mark.heavy, pytest.mark.timeout(420)], id="200"),
        pytest.param(2000, 1500.0, marks=[pytest.mark.extended, pytest.mark.timeout(2000)], id="2000"),
    ],
)
async def test_sandboxes_come_and_go_over_cuts_and_nothing_is_wrong_or_left(
    redis: RedisServer, lives: int, seconds: float, record_property: Callable[[str, object], None]
) -> None:
    async with far_hive(redis) as hive:
        churn = Churn(hive, lives, seconds)
        await churn.run()
        record_property("destroyed", len(churn.ended))
        record_property("answers", dict(sorted(churn.kinds.items())))
        record_property("tracebacks in the log", hive.place.said().count("Traceback"))
        assert not hive.ended_replicas()
        wrong = churn.wrong + await check_ends(hive, churn.ended)
        left = await hive.nothing_left(churn.ended)
        assert not wrong + left, "\n".join(wrong + left)
        assert len(churn.ended) > len(CUTS) * WORKERS
        while hive.replicas:
            assert await hive.stop(hive.replicas[0]) == 0
        assert not hive.place.remains()


SLOW_RECIPE: Final = 'name = "sluggish"\ndescription = "Starts slowly."\nserver = { python = "sluggish:server" }\n'
SLOW_SERVER: Final = """
import time
from fastmcp import FastMCP
time.sleep(15)
server = FastMCP("sluggish")
@server.tool
def ping() -> str:
    return "pong"
"""


@pytest.mark.heavy
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["closed", "silent"])
async def test_what_starts_while_redis_is_away_is_deleted_by_no_other_replica(
    redis: RedisServer, how: Cut, tmp_path: Any
) -> None:
    folder = tmp_path / "sluggish"
    folder.mkdir()
    (folder / "recipe.toml").write_text(SLOW_RECIPE)
    (folder / "sluggish.py").write_text(SLOW_SERVER)
    async with far_hive(redis, ASH_HUB_RECIPE_DIRS=f'["{tmp_path}"]') as hive:
        maker, other, third = hive.replicas
        said: list[Said] = []

        async def spawn() -> None:
            said.append(await maker.tool("spawn", recipe="sluggish", session="slow", idempotency_key="once"))

        async with anyio.create_task_group() as group:
            group.start_soon(spawn)
            with anyio.fail_after(20):
                while not await other.sandboxes():
                    await anyio.sleep(0.1)
            await hive.proxy.cut(how)
            await anyio.sleep(10)
            await hive.proxy.heal()
        first = said[0]
        assert first.good or (first.may_be_repeated and first.kind == "connect_failed"), first
        await hive.all_ready()
        again = first if first.good else await maker.tool(
            "spawn", recipe="sluggish", session="slow", idempotency_key="once"
        )  # fmt: skip
        assert again.good, again
        for replica in (maker, other, third):
            pong = await replica.tool("slow_ping")
            assert pong.good, pong
        assert (await other.tool("destroy", session="slow")).content["destroyed"]
        assert await check_ends(hive, [again.content["sandbox_id"]]) == []
        left = await hive.nothing_left([again.content["sandbox_id"]])
        assert not left, "\n".join(left)


@pytest.mark.heavy
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["closed", "silent"])
async def test_a_replica_that_stops_while_redis_is_away_ends_nothing_that_another_has(
    redis: RedisServer, how: Cut
) -> None:
    async with far_hive(redis) as hive:
        made: dict[str, str] = {}
        for number, replica in enumerate(hive.replicas):
            said = await replica.tool("spawn", recipe="echo", session=f"box{number}")
            assert said.good, said
            made[f"box{number}"] = said.content["sandbox_id"]
        await hive.proxy.cut(how)
        await anyio.sleep(3)
        assert await hive.stop(hive.replicas[0]) == 0
        await check_living(hive, made)
        await anyio.sleep(4)
        await hive.proxy.heal()
        await hive.all_ready()
        await anyio.sleep(6)  # a sweep of the reaper, and another that acts on what the first found
        await check_living(hive, made)
        assert not hive.ended_replicas()


async def check_living(hive: FarHive, made: dict[str, str]) -> None:
    """Check that every replica lists and calls each of the sandboxes."""
    for replica in hive.replicas:
        listed = await replica.sandboxes()
        assert {box["session"]: name for name, box in listed.items() if box["status"] == "ready"} == made
        for session in made:
            said = await replica.tool(f"{session}_echo", text=session)
            assert said.good and said.content == {"text": session}, said
