"""The egress proxy of a cluster: one listener for many sandboxes, whose policies a hive tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ash_hub.egress.connected_sandboxes import POLICY_LEASE_SECONDS
from ash_hub.egress.limits import Limits
from ash_hub.egress.policy import MOST_ENTRIES
from ash_hub.egress.signing import ANSWER, LONGEST_LINE, MOST_ASKED, QUESTION, greeting, read_line, token, write_line
from ash_hub.settings import NetworkEntry
from tests.hub.egress.egress_parts import WAIT_SECONDS, connect, error_of, get, web_server
from tests.hub.egress.shared_parts import CONNECTIONS, Shared, passes, shared_proxy, tunnel_server

pytestmark = pytest.mark.anyio

KEY = bytes(range(32))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class StandInHive:
    """Answers as a hub does, by a table."""

    known: dict[str, Any] = field(default_factory=dict[str, Any])
    asked: set[str] = field(default_factory=set[str])
    key: bytes = KEY
    is_away: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    def allow(self, sandbox: str, *policy: str, address: str = "127.0.0.1", **limits: Any) -> None:
        self.known[sandbox] = {"policy": policy or "none", "limits": limits, "addresses": [address]}

    async def told(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = read_line(KEY, QUESTION, await reader.readline())
        self.asked |= set(question["sandboxes"])
        if not self.is_away:
            said = {sandbox: self.known.get(sandbox) for sandbox in question["sandboxes"]}
            writer.write(write_line(self.key, ANSWER, {"nonce": question["nonce"], "sandboxes": said}))
            with suppress(OSError):
                await writer.drain()
        writer.close()
        self.heard.set()


@asynccontextmanager
async def sharing(
    folder: Path, *, drain_seconds: float = 0, is_away: bool = False
) -> AsyncGenerator[tuple[Shared, StandInHive]]:
    """Run the proxy with a stand-in of its hive."""
    hive = StandInHive(is_away=is_away)
    async with await asyncio.start_server(hive.told, "127.0.0.1", 0) as server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with shared_proxy(folder, hive=place, key=KEY, drain_seconds=drain_seconds) as shared:
            yield shared, hive


async def test_each_sandbox_goes_out_by_its_own_policy_and_decisions_are_lines(tmp_path: Path) -> None:
    async with sharing(tmp_path) as (it, hive), web_server() as (port, heads):
        hive.allow("sbx-1", f"one.test=127.0.0.1:{port}")
        hive.allow("sbx-2", "two.test")
        assert (await it.ask("sbx-1", get(f"http://one.test:{port}/"))).endswith(b"ok")
        assert heads and await it.is_ready()
        assert error_of(await it.ask("sbx-2", get(f"http://one.test:{port}/")))["reason"] == "not_listed"
        told = [await it.line(event="egress"), await it.line(event="egress")]
    assert [(each["sandbox"], each["decision"], each["policy"]) for each in told] == [
        ("sbx-1", "allowed", f"one.test=127.0.0.1:{port}"),
        ("sbx-2", "refused", "two.test"),
    ]


async def test_nobody_goes_out_who_is_not_the_sandbox_that_it_says(tmp_path: Path) -> None:
    async with sharing(tmp_path) as (it, hive):
        hive.allow("sbx-1", "one.test")
        hive.allow("sbx-2", "two.test", address="192.0.2.7")
        for first in (
            b"",
            greeting("sbx-1", token(KEY, "sbx-2")),
            greeting("sbx-1", "0" * 64),
            b"\xff\r\n",
            b"x" * 99,
        ):
            answer = await it.ask("sbx-1", get("http://one.test/"), first=first)
            assert error_of(answer)["reason"] == "no_greeting", first
        assert not hive.asked, "who proves nothing makes nobody work"
        assert error_of(await it.ask("sbx-2", get("http://two.test/")))["reason"] == "not_its_address"
        assert await it.ask("sbx-3", get("http://one.test/")) == b""  # the hive knows no such sandbox


async def test_a_narrowed_policy_closes_what_it_refuses_within_the_life_of_an_answer(tmp_path: Path) -> None:
    async with sharing(tmp_path) as (it, hive), tunnel_server() as here, tunnel_server() as there:
        hive.allow("sbx-1", here, there)
        one, two = await it.connect("sbx-1", connect(here)), await it.connect("sbx-1", connect(there))
        assert await passes(*one, first=True) and await passes(*two, first=True)
        hive.allow("sbx-1", here)
        await asyncio.sleep(POLICY_LEASE_SECONDS)  # what is promised; before, the tunnel may pass or not
        assert not await passes(*two)
        assert await passes(*one), "what is still granted stays open"
        assert error_of(await it.ask("sbx-1", connect(there)))["reason"] == "port"
        del hive.known["sbx-1"]
        async with asyncio.timeout(WAIT_SECONDS):
            assert await one[0].read() == b"", "a sandbox that is gone leaves nothing open"


async def test_connections_that_wait_are_bounded_in_number_and_time_and_keep_no_other_sandbox_out(
    tmp_path: Path,
) -> None:
    async with sharing(tmp_path) as (it, hive), tunnel_server() as here:
        hive.allow("sbx-1", here, address="127.0.0.2", connect_seconds=1.0)
        hive.allow("sbx-2", here, address="127.0.0.3")
        served = [await it.connect("sbx-1", connect(here), address="127.0.0.2") for _ in range(CONNECTIONS)]
        assert all([await passes(*each, first=True) for each in served])
        waiting = [await it.connect("sbx-1", connect(here), address="127.0.0.2") for _ in range(CONNECTIONS)]
        other = await it.connect("sbx-2", connect(here), address="127.0.0.3")
        assert await passes(*other, first=True), "a sandbox that has none gets one"
        async with asyncio.timeout(WAIT_SECONDS):
            answers = [await _whole(reader) for reader, _ in waiting]
    told = [error_of(answer)["reason"] for answer in answers if answer]
    assert told == ["too_many_connections"] * (CONNECTIONS // 2), "the rest was closed as it came"


async def _whole(reader: asyncio.StreamReader) -> bytes:
    with suppress(ConnectionError):
        return await reader.read()
    return b""


async def test_without_an_answer_nothing_passes_and_it_goes_on_with_the_next(tmp_path: Path) -> None:
    async with sharing(tmp_path) as (it, hive), tunnel_server() as here:
        hive.allow("sbx-1", here)
        reader, writer = await it.connect("sbx-1", connect(here))
        assert await passes(reader, writer, first=True)
        hive.is_away = True
        await it.line(event="hive", outcome="away")
        await asyncio.sleep(POLICY_LEASE_SECONDS)
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await reader.readexactly(1)
        hive.is_away = False
        async with asyncio.timeout(WAIT_SECONDS):
            assert await reader.readexactly(4) == b"held"


def test_an_answer_about_as_many_as_are_asked_at_once_fits_into_a_line() -> None:
    longest = int(TypeAdapter(NetworkEntry).json_schema()["maxLength"])
    policy = ["x" * longest] * MOST_ENTRIES
    said = {"policy": policy, "limits": asdict(Limits()), "addresses": ["f" * 39] * 2}
    line = write_line(KEY, ANSWER, {"nonce": "0" * 32, "sandboxes": {f"{n:063}": said for n in range(MOST_ASKED)}})
    assert len(line) < LONGEST_LINE


async def test_an_answer_that_another_has_written_is_none(tmp_path: Path) -> None:
    async with sharing(tmp_path, is_away=True) as (it, hive):
        hive.allow("sbx-1", "one.test")
        assert not await it.is_ready()
        hive.key, hive.is_away = bytes(32), False
        hive.heard.clear()
        await hive.heard.wait()
        await it.line(event="hive", message="a line is not signed by the key of this hive's egress proxies")
        assert not await it.is_ready()


async def test_a_proxy_that_is_told_to_end_lets_open_connections_go_on_for_a_while(tmp_path: Path) -> None:
    async with sharing(tmp_path, drain_seconds=20) as (it, hive), tunnel_server() as here:
        hive.allow("sbx-1", here)
        reader, writer = await it.connect("sbx-1", connect(here))
        assert await passes(reader, writer, first=True)
        it.process.terminate()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(WAIT_SECONDS):
                while True:
                    (await asyncio.open_connection("127.0.0.1", it.port))[1].close()
        await asyncio.sleep(POLICY_LEASE_SECONDS)
        assert await passes(reader, writer), "it asks its hive until it ends"
        writer.transport.abort()  # so that it has nothing left to wait for
