"""Two keys of one real hive: one floods it with spawns, calls and streams, and the other hardly notices."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest

from ash_hub.bench.callers import percentile, run_callers
from ash_hub.bench.wire import modern_call
from ash_hub.serving.auth import key_file
from ash_hub.spawning.refusal_pace import BURST, PER_SECOND
from ash_mcp import Hive
from ash_mcp.types import PrincipalLimits
from tests.hive_process import hive_in
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.flood import SANDBOXES, SPAWNS

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, pytest.mark.alone, pytest.mark.timeout(180), needs_isolation]

MOST_SANDBOXES = SANDBOXES + 1
SECONDS = 3.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class TwoKeys:
    """A real hive, and the keys of its two owners."""

    url: str
    pid: int
    ann: str
    bob: str

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port


@pytest.fixture
def hive() -> Generator[TwoKeys]:
    home = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    keys = key_file(home / "state")
    _, ann = keys.add(subject="ann", limits=PrincipalLimits(sandboxes=MOST_SANDBOXES))
    _, bob = keys.add(subject="bob")
    try:
        with hive_in(home) as (url, pid):
            yield TwoKeys(url, pid, ann, bob)
    finally:
        shutil.rmtree(home)


@contextmanager
def flooding(port: int, token: str) -> Generator[dict[str, Any]]:
    """Flood in a process of its own; what it came to is in the dictionary afterwards."""
    command = [sys.executable, "-m", "tests.system.flood", str(port), token]
    found: dict[str, Any] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "flooding\n"
            yield found
            found.update(json.loads(program.communicate(timeout=30)[0]))
        finally:
            program.kill()


async def test_a_key_that_floods_keeps_another_neither_from_spawning_nor_from_calling(
    hive: TwoKeys, record_property: Callable[[str, object], None]
) -> None:
    bearer = {"authorization": f"Bearer {hive.bob}"}
    call = modern_call("tools/call", {"name": "sb1_echo", "arguments": {"text": "x"}}, bearer)
    async with Hive(hive.url, token=hive.ann) as of_ann, Hive(hive.url, token=hive.bob) as of_bob:
        for _ in range(SANDBOXES):
            await of_ann.spawn("echo")
        await of_bob.spawn("echo")
        (alone,) = await run_callers(hive.port, hive.pid, SECONDS, [call])
        with flooding(hive.port, hive.ann) as flood:
            began = anyio.current_time()
            await of_bob.spawn("echo")
            spawn_seconds = anyio.current_time() - began
            (beside,) = await run_callers(hive.port, hive.pid, SECONDS, [call])
    p50 = {name: percentile(run.latencies, 0.5) for name, run in (("alone", alone), ("beside", beside))}
    flooders = statistics.median(flood["latencies"])
    record_property("call_p50_ms_alone", round(p50["alone"] * 1000, 3))
    record_property("call_p50_ms_beside_a_flood", round(p50["beside"] * 1000, 3))
    record_property("ratio", round(p50["beside"] / p50["alone"], 2))
    record_property("spawn_seconds_beside_a_flood", round(spawn_seconds, 2))
    record_property("flooding_call_p50_ms", round(flooders * 1000, 3))
    assert flood["called"] == {"done": len(flood["latencies"])} and flood["broken"] == 0
    assert set(flood["spawned"]) <= {"done", "capacity_exceeded"} and flood["spawned"]["capacity_exceeded"] > 0
    # one at each answer of each of its spawns would be hundreds a second
    assert flood["spawned"]["capacity_exceeded"] <= BURST + PER_SECOND * flood["seconds"] + SPAWNS
    # in one of the flood's own queues a call would take as long as the flood's; compared are times of one machine
    assert p50["beside"] < flooders / 3
