"""Requests and answers of every shape: what passes the relay is what another parser, h11, reads in it, or nothing.

`ASH_FUZZ_EXAMPLES` makes a longer run of it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import h11
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from ash_router.caller.relay import RelayLimits
from tests.router.relay_parts import Rig, open_rig
from tests.router.sandbox_parts import open_script

pytestmark = pytest.mark.anyio

LIMITS = RelayLimits(head_timeout_seconds=0.05, body_timeout_seconds=0.05, linger_seconds=0.05)
EXAMPLES = int(os.environ.get("ASH_FUZZ_EXAMPLES", "150"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HEADERS_COMPARED = (b"content-type", b"accept", b"mcp-param-x")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


# What h11 reads


@dataclass(frozen=True)
class Read:
    """One whole message."""

    start: tuple[bytes, ...]
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    rest: bytes

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


def read(data: bytes, role: Any, *, ended: bool = False) -> Read | str:
    """Return the first message in `data`, or why there is none."""
    connection = h11.Connection(role, max_incomplete_event_size=2**20)
    if role is h11.CLIENT:
        connection.send(h11.Request(method="GET", target="/", headers=[("host", "hub")]))
        connection.send(h11.EndOfMessage())
    head: Any = None
    body = b""
    try:
        connection.receive_data(data)
        if ended:
            connection.receive_data(b"")
        while True:
            found: Any = connection.next_event()
            if found is h11.NEED_DATA or found is h11.PAUSED or isinstance(found, h11.ConnectionClosed):
                return "not whole"
            if isinstance(found, h11.Request | h11.Response):
                head = found
            elif isinstance(found, h11.Data):
                body += found.data
            elif isinstance(found, h11.EndOfMessage):
                break
    except h11.RemoteProtocolError as error:
        return str(error)
    start = (head.method, head.target) if isinstance(head, h11.Request) else (b"%d" % head.status_code,)
    return Read(start, list(head.headers), body, connection.trailing_data[0])


# Requests

SMALL = st.binary(max_size=12)


def mostly(good: bytes, *odd: bytes) -> st.SearchStrategy[bytes]:
    """Choose what is as it should be, so often that a whole message often is, or something odd."""
    return st.sampled_from([good] * 6 * len(odd) + list(odd))


ENDS = mostly(b"\r\n", b"\n", b"\r", b"\r\r\n", b" \r\n", b"\r\n ")
TARGETS = mostly(
    b"/s/sb1/mcp",
    *(b"http://hub/s/sb1/mcp", b"hub:80", b"*", b"//s/sb1/mcp", b"/s/sb1/mcp?x=1", b"/s/sb1/mcp#x", b"/s/%73b1/mcp"),
)
VERSIONS = mostly(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"http/1.1", b"HTTP/1.1 ", b"HTTP/11")
METHODS = mostly(b"POST", b"GET", b"DELETE", b"post", b"PO ST", b"CONNECT")
LENGTHS = mostly(
    *(b"%d", b"+%d", b"-%d", b"0x%x", b"0%d", b"%d, %d", b"%d\t", b" %d", b"%d\x0b", b"%d0", b"%d;", b"%d.0")
)
CODINGS = mostly(
    *(b"chunked", b"Chunked", b"chunked, chunked", b"identity", b"gzip, chunked", b"chunked;q=1", b"xchunked"),
    *(b"\tchunked", b"\x0bchunked", b"chunked,", b",chunked", b'"chunked"', b"chunked\x00"),
)
OTHERS = mostly(
    *(b"mcp-param-x: y", b"Mcp-Param-X : y", b"mcp-param-x:\ty\t", b"mcp-param-x: a\x00b", b"mcp-param-x: a\x0bb"),
    *(b"mcp-param-x: a\r\n folded", b"mcp-param-x: \xe4", b"x\xff: y", b"no colon", b": empty", b""),
    *(b"accept: a/b", b"content-type: a/b", b"connection: content-length", b"expect: 100-continue", b"upgrade: h2c"),
)
SIZES = mostly(
    *(b"%x", b"%X", b"0%x", b"0x%x", b"+%x", b"%x;a=b", b'%x;a="\n"', b"%x ", b" %x", b"%x;", b"%x\t;a", b"-%x")
)
LAST_CHUNKS = mostly(b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"00\r\n\r\n", b"0;a\r\n\r\n", b"0\n\n", b"")
STATUSES = mostly(b"200 OK", b"204 No Content", b"404 no", b"100 Go on", b"2000 OK", b"20 OK")


@st.composite
def chunks(draw: st.DrawFn) -> bytes:
    parts = [draw(st.binary(min_size=1, max_size=12)) for _ in range(draw(st.integers(0, 3)))]
    made = b"".join(draw(SIZES) % len(part) + draw(ENDS) + part + draw(ENDS) for part in parts)
    return made + draw(LAST_CHUNKS)


@st.composite
def framed(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """Header lines that frame a body, and the body, more or less so framed."""
    how = draw(st.sampled_from(["length"] * 4 + ["chunked"] * 4 + ["both", "twice", "none"]))
    if how == "none":
        return [], draw(SMALL)
    body = draw(SMALL)
    wanted = draw(LENGTHS)
    length = b"content-length: " + wanted % ((len(body),) * wanted.count(b"%"))
    if how == "length":
        return [length], body
    if how == "twice":
        return [length, draw(st.sampled_from([length, b"Content-Length: 3"]))], body
    coding = b"transfer-encoding: " + draw(CODINGS)
    return [coding] if how == "chunked" else [length, coding], draw(chunks())


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    for _ in range(draw(st.sampled_from([0] * 9 + [1, 2]))):
        place = draw(st.integers(0, len(data)))
        put = draw(st.sampled_from([b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b";", b"0", b"\xff", b""]))
        data = data[:place] + put + data[place + draw(st.integers(0, 2)) :]
    return data


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    framing, body = draw(framed())
    lines = draw(st.permutations([b"host: hub", *framing, *draw(st.lists(OTHERS, max_size=2))]))
    first = b" ".join([draw(METHODS), draw(TARGETS), draw(VERSIONS)])
    head = b"".join(line + draw(ENDS) for line in [first, *lines]) + b"\r\n"
    behind = draw(st.sampled_from([b""] * 4 + [b"GET /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\n\r\n", b"\r\n", b"x"]))
    return draw(mutated(head + body)) + behind


@dataclass(repr=False)
class Listener:
    """A sandbox that reads with h11 and says what it read."""

    read: list[Read] = field(default_factory=list[Read])
    wrong: list[bytes] = field(default_factory=list[bytes])
    answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
    open: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        data = b""
        try:
            while more := await reader.read(65_536):
                data += more
                message = read(data, h11.SERVER)
                if isinstance(message, Read):
                    self.read.append(message)
                    writer.write(self.answer)
                    await writer.drain()
                    return
                if message != "not whole":
                    self.wrong.append(data)
        finally:
            self.open -= 1

    async def left(self) -> None:
        with anyio.fail_after(30):
            while self.open:
                await asyncio.sleep(0)


@pytest.fixture
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path, limits=getattr(request, "param", LIMITS)) as rig:
        yield rig


@pytest.fixture
async def listener(rig: Rig) -> AsyncGenerator[Listener]:
    listener = Listener()
    async with open_script(rig.directory, listener) as socket:
        await rig.bind("sb1", socket)
        yield listener


async def ask(rig: Rig, data: bytes) -> bytes:
    """Send `data` and return all that is answered until the hub closes or has nothing more to say."""
    answer = b""
    # where this process did not run for longer than the limits, the hub may have closed before it got all of `data`
    with anyio.fail_after(30), suppress(ConnectionResetError, BrokenPipeError):
        async with rig.connect() as wire:
            await wire.send(data)
            while more := await wire.reader.read(65_536):
                answer += more
                if isinstance(read(answer, h11.CLIENT), Read):
                    break
    return answer


@fuzz
@given(requests())
@example(b"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\ntransfer-encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n")
@example(b"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\ncontent-length: 2\r\n\r\n{}GET / HTTP/1.1\r\n\r\n")
@example(b"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\nmcp-param-x:  a  \r\ncontent-length: 02\r\n\r\n{}")
async def test_a_sandbox_is_told_what_h11_reads_in_a_request_or_nothing(rig: Rig, listener: Listener, data: bytes):
    listener.read.clear()
    answer = await ask(rig, data)
    event("passed" if b"ash-origin: sandbox" in answer else "refused" if answer else "closed")
    await listener.left()
    assert listener.wrong == [], "the sandbox was sent what is no request"
    assert len(listener.read) <= 1, "one request became several"
    for told in listener.read:
        # line ends before a request are skipped; the parser below takes a lone CR for one
        asked = read(data.lstrip(b"\r\n"), h11.SERVER)
        if asked == "Missing mandatory Host: header":
            continue  # that is admission's to refuse, and this hub's does not
        assert isinstance(asked, Read), f"h11 refuses what passed: {asked}"
        assert told.start == (asked.start[0], b"/mcp")
        assert told.body == asked.body
        assert told.rest == b""
        for name in HEADERS_COMPARED:
            assert told.values(name) == asked.values(name)
    if b"ash-origin: sandbox" in answer:
        assert len(listener.read) == 1


# Answers


@st.composite
def responses(draw: st.DrawFn) -> bytes:
    framing, body = draw(framed())
    status = draw(STATUSES)
    lines = draw(st.permutations([*framing, *draw(st.lists(OTHERS, max_size=2))]))
    first = draw(VERSIONS) + b" " + status
    head = b"".join(line + draw(ENDS) for line in [first, *lines]) + b"\r\n"
    behind = draw(st.sampled_from([b""] * 4 + [b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx", b"x"]))
    return draw(mutated(head + body)) + behind


# the request is always whole, so no limit of time has to end it, and a busy machine must not
@pytest.mark.parametrize("rig", [RelayLimits()], indirect=True, ids=["patient"])
@fuzz
@given(responses())
@example(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{}")
@example(b"HTTP/1.1 200 \x00OK\r\ncontent-length: 0\r\n\r\n")
@example(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}x")
async def test_a_caller_is_told_what_h11_reads_in_an_answer_or_of_a_failure(rig: Rig, listener: Listener, data: bytes):
    listener.answer = data
    answer = await ask(
        rig, b"POST /s/sb1/mcp HTTP/1.1\r\nhost: hub\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"
    )
    await listener.left()
    told = read(answer, h11.CLIENT)
    event("cut" if isinstance(told, str) else "passed" if b"ash-origin: sandbox" in answer else "refused")
    if not isinstance(told, Read):
        assert b"ash-origin: sandbox" in answer, "the hive's own answer is broken"
        return  # cut short, so that nobody takes it for whole
    assert told.rest == b""
    assert len(told.values(b"ash-origin")) == 1
    if told.values(b"ash-origin") == [b"hub"]:
        return
    # what is said beside a status is thrown away, whatever it holds
    said = read(re.sub(rb"\A[\r\n]*(HTTP/1.[01] \d{3})[^\r\n]*", rb"\1 any", data), h11.CLIENT, ended=True)
    assert isinstance(said, Read), f"h11 refuses what passed: {said}"
    assert (told.start, told.body) == (said.start, said.body)
    assert told.values(b"content-type") == said.values(b"content-type")
