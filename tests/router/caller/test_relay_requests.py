"""What the relay takes from a caller's connection, and what it refuses: limits, framing, admission, pipelining."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_mcp.errors import SandboxGone
from ash_router.caller.intake import Phase
from ash_router.caller.relay import RelayLimits
from tests.router.relay_parts import Rig, modern, open_rig, tool_call
from tests.router.sandbox_parts import Box

pytestmark = pytest.mark.anyio

SMALL = RelayLimits(max_body_bytes=2000, max_head_bytes=4000, max_headers=20)
QUICK = RelayLimits(head_timeout_seconds=0.2, body_timeout_seconds=0.2, linger_seconds=0.3)
ADD = tool_call("sb1_add", {"a": 1, "b": 2})
PLAIN = b"GET /plain HTTP/1.1\r\nhost: hub\r\n\r\n"


@pytest.fixture
async def small(tmp_path: Path) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path, limits=SMALL) as rig:
        yield rig


@pytest.fixture
async def quick(tmp_path: Path) -> AsyncGenerator[Rig]:
    async with open_rig(tmp_path, limits=QUICK) as rig:
        yield rig


def kind(body: bytes) -> str:
    return json.loads(body)["error"]["kind"]


def structured(body: bytes) -> dict[str, Any]:
    data = body.partition(b"data: ")[2] if body.startswith(b"event:") else body
    return json.loads(data)["result"]["structuredContent"]


async def refusal(rig: Rig, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send something that must be refused, and check that the refusal is whole, ours, and the end."""
    async with rig.connect() as wire:
        await wire.send(request)
        status, headers, body = await wire.answer()
        assert headers["ash-origin"] == "hub"
        assert headers["connection"] == "close"
        assert headers["content-type"] == "application/json"
        assert await wire.ended()
        return status, headers, body


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /plain HTTP/1.1\r\nhost: hub\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\na", 400),
        (b"GET /plain HTTP/1.1\r\nhost: hub\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\na", 400),
        (b"POST /mcp HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /mcp HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", 400),
        (b"POST /mcp HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /mcp HTTP/1.1\r\ntransfer-encoding: identity\r\n\r\n", 400),
        (b"POST /mcp HTTP/1.1\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /mcp HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /mcp HTTP/1.1\r\ncontent-length: +1\r\n\r\na", 400),
        (b"POST /mcp HTTP/1.1\r\ncontent-length : 1\r\n\r\na", 400),
        (b"GET /plain HTTP/1.1\r\nhost: hub\r\n folded\r\n\r\n", 400),
        (b"GET /plain HTTP/1.1\r\nhost: hub\nx: y\r\n\r\n", 400),
        (b"GET /plain HTTP/1.1\r\nhost: a\x00b\r\n\r\n", 400),
        (b"GET http://hub/plain HTTP/1.1\r\nhost: hub\r\n\r\n", 400),
        (b"GET //\xff HTTP/1.1\r\nhost: hub\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nhost: hub\r\n\r\n", 400),
        (b"CONNECT sandbox:80 HTTP/1.1\r\nhost: hub\r\n\r\nGET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /plain HTTP/2.0\r\nhost: hub\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),
    ],
)
async def test_a_request_whose_framing_is_unsure_is_refused(rig: Rig, request_head: bytes, status: int):
    answered, _, body = await refusal(rig, request_head)
    assert answered == status
    assert kind(body) == "bad_request"


async def test_a_body_that_is_not_chunked_as_announced_is_refused(rig: Rig, box: Box):
    answered, _, _ = await refusal(rig, modern("sb1_add", b"zz\r\nabc", framing="transfer-encoding: chunked\r\n"))
    assert answered == 400
    assert box.heads == []


@pytest.mark.parametrize(
    "head",
    [
        b"GET /plain HTTP/1.1\r\nhost: hub\r\nx: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET /plain HTTP/1.1\r\n" + b"x: y\r\n" * 21 + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: hub\r\n\r\n",
    ],
)
async def test_a_head_over_its_limits_is_refused(small: Rig, head: bytes):
    answered, _, body = await refusal(small, head)
    assert answered == 431
    assert kind(body) == "capacity_exceeded"


async def test_an_endless_header_line_is_refused_before_it_ends(tmp_path: Path):
    limits = RelayLimits(max_head_bytes=4000, linger_seconds=60)  # as long as it takes to read the refusal
    async with open_rig(tmp_path, limits=limits) as rig, rig.connect() as wire:
        await wire.send(b"GET /plain HTTP/1.1\r\nx: ")
        while not wire.reader.at_eof() and not wire.received():
            await wire.send(b"a" * 500)
            await asyncio.sleep(0)
        status, _, _ = await wire.answer()
    assert status == 431


async def test_a_body_over_its_limit_is_refused_by_its_announcement(small: Rig):
    head = modern("call", b"", framing="content-length: 2001\r\n", more="expect: 100-continue\r\n")
    answered, _, body = await refusal(small, head)
    assert answered == 413
    assert kind(body) == "capacity_exceeded"


async def test_a_chunked_body_over_its_limit_is_refused_while_it_comes(small: Rig):
    body = b"7d1\r\n" + b"a" * 2001 + b"\r\n"
    answered, _, _ = await refusal(small, modern("call", body, framing="transfer-encoding: chunked\r\n"))
    assert answered == 413


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /plain HTTP/1.1\r\nhost:",
        modern("call", b"{", framing="content-length: 9\r\n"),
        b"POST /plain HTTP/1.1\r\nhost: hub\r\ncontent-length: 9\r\n\r\nabc",
        b"POST /plain HTTP/1.1\r\nhost: hub\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n",
    ],
)
async def test_a_request_that_does_not_arrive_in_time_is_refused(quick: Rig, sent: bytes):
    answered, _, body = await refusal(quick, sent)
    assert answered == 408
    assert json.loads(body)["error"]["retryable"] is True


async def test_a_body_that_does_not_arrive_after_a_late_verdict_is_refused(quick: Rig):
    quick.admission.gate = asyncio.Event()
    async with quick.connect() as wire:
        await wire.send(modern("call", b"{", framing="content-length: 9\r\n"))
        with anyio.fail_after(10):
            await quick.admission.waits.wait()
        quick.admission.gate.set()
        assert (await wire.answer())[0] == 408


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n"])
async def test_a_connection_that_asks_nothing_is_closed(quick: Rig, sent: bytes):
    async with quick.connect() as wire:
        await wire.send(sent)
        assert await wire.ended()


async def test_a_refusal_of_admission_is_answered_as_it_is_whatever_was_asked(rig: Rig, box: Box):
    nobody = "x-principal: nobody\r\n"
    for request in (modern("sb1_add", ADD, more=nobody), b"GET /plain HTTP/1.1\r\n" + nobody.encode() + b"\r\n"):
        status, headers, body = await refusal(rig, request)
        assert status == 401
        assert headers["www-authenticate"] == "bearer"
        assert kind(body) == "ash_error"
    assert box.heads == []


async def test_the_verdict_and_the_admitted_path_stand_in_the_scope(rig: Rig):
    async with rig.connect() as wire:
        await wire.send(b"GET /plain/in/tidy?a=b HTTP/1.1\r\nx-principal: ann\r\n\r\n")
        status, headers, body = await wire.answer()
    assert status == 200
    assert headers["ash-origin"] == "hub"
    said = json.loads(body)
    assert (said["subject"], said["path"], said["raw_path"], said["query"]) == ("ann", "/plain", "/plain", "a=b")


def has_all_or_stops_reading(connection: Any) -> bool:
    """Whether all has come that will before the verdict."""
    return connection._phase is Phase.ADMITTING and (connection._received_all or connection.flow.read_paused)


@pytest.mark.parametrize("size", [0, 10, 300_000])
async def test_a_verdict_that_takes_time_loses_nothing_of_the_body(rig: Rig, size: int):
    rig.admission.gate = asyncio.Event()
    async with rig.connect() as wire:
        wire.writer.write(b"POST /plain HTTP/1.1\r\nhost: hub\r\ncontent-length: %d\r\n\r\n" % size + b"a" * size)
        await rig.take_in(has_all_or_stops_reading)
        rig.admission.gate.set()
        status, _, body = await wire.answer()
    assert status == 200
    assert json.loads(body)["size"] == size


async def test_a_verdict_that_takes_time_still_lets_a_call_be_relayed(rig: Rig, box: Box):
    rig.admission.gate = asyncio.Event()
    value = "x" * 300_000
    async with rig.connect() as wire:
        wire.writer.write(modern("sb1_echo", tool_call("sb1_echo", {"value": value})))
        await rig.take_in(has_all_or_stops_reading)
        rig.admission.gate.set()
        _, headers, body = await wire.answer()
    assert headers["ash-origin"] == "sandbox"
    assert structured(body) == {"value": value}


async def test_what_is_pipelined_before_the_verdict_is_dropped_too(rig: Rig, box: Box):
    rig.admission.gate = asyncio.Event()
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", ADD) * 2)
        await rig.take_in(lambda connection: connection._pipelined)
        rig.admission.gate.set()
        status, headers, body = await wire.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert structured(body) == {"result": 3}
        assert await wire.ended()


async def test_a_chunked_body_is_relayed_with_a_length(rig: Rig, box: Box):
    body = b"5;x=y\r\n" + ADD[:5] + b"\r\n%x\r\n" % len(ADD[5:]) + ADD[5:] + b"\r\n0\r\nash-token: forged\r\n\r\n"
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", body, framing="transfer-encoding: chunked\r\n"))
        _, _, answer = await wire.answer()
    assert structured(answer) == {"result": 3}
    (head,) = box.heads
    assert "transfer-encoding" not in head
    assert int(head["content-length"]) == len(ADD) - len("sb1_")
    assert head["ash-token"] != "forged"


async def test_a_trailer_never_becomes_a_header_of_an_admitted_request(rig: Rig):
    request = b"POST /plain HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nmcp-session-id: x\r\n\r\n"
    async with rig.connect() as wire:
        await wire.send(request)
        _, _, body = await wire.answer()
    assert json.loads(body)["headers"] == ["transfer-encoding"]


async def test_only_allowed_headers_reach_the_sandbox(rig: Rig, box: Box):
    more = "authorization: Bearer x\r\ncookie: a=b\r\nash-scope: s\r\nash-token: t\r\nx-other: y\r\nmcp-param-q: p\r\n"
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", ADD, more=more))
        await wire.answer()
    (head,) = box.heads
    assert set(head) == {
        ":method", "host", "content-length", "content-type", "accept", "mcp-protocol-version", "mcp-method",
        "mcp-param-q", "ash-token", "mcp-name",
    }  # fmt: skip
    assert (head["mcp-name"], head["host"]) == ("add", "sandbox")
    assert head["ash-token"].count(".") == 2


async def test_a_client_that_waits_for_it_is_told_to_continue(rig: Rig, box: Box):
    async with rig.connect() as wire:
        framing = f"content-length: {len(ADD)}\r\nexpect: 100-continue\r\n"
        await wire.send(modern("sb1_add", b"", framing=framing))
        assert (await wire.head())[0] == 100
        await wire.send(ADD)
        status, _, body = await wire.answer()
    assert status == 200
    assert structured(body) == {"result": 3}


async def test_relayed_and_other_requests_share_a_connection(rig: Rig, box: Box):
    async with rig.connect() as wire:
        for _ in range(3):
            await wire.send(modern("sb1_add", ADD))
            assert structured((await wire.answer())[2]) == {"result": 3}
            await wire.send(b"POST /plain HTTP/1.1\r\nhost: hub\r\ncontent-length: 2\r\n\r\nab")
            assert json.loads((await wire.answer())[2])["size"] == 2
            await wire.send(modern("hello", tool_call("hello")))
            assert structured((await wire.answer())[2]) == {"result": "hello from the hub"}
    assert len(box.heads) == 3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (modern("sb1_add", ADD), modern("sb1_add", ADD)),
        (modern("sb1_add", ADD), b"GET /plain HTTP/1.1\r\nhost: hub\r\n\r\n"),
        (b"GET /plain HTTP/1.1\r\nhost: hub\r\n\r\n", modern("sb1_add", ADD)),
        (modern("sb1_add", ADD), b"garbage\r\n\r\n"),
        (modern("hello", tool_call("hello")), modern("sb1_add", ADD)),
    ],
)
async def test_what_is_pipelined_is_dropped_and_the_first_is_answered(rig: Rig, box: Box, first: bytes, second: bytes):
    async with rig.connect() as wire:
        await wire.send(first + second)
        status, headers, _ = await wire.answer()
        assert status == 200
        assert headers["connection"] == "close"
        assert await wire.ended()
    assert len(box.heads) == (1 if b"sb1_add" in first else 0)


async def test_an_answer_to_http_1_0_ends_with_the_connection(rig: Rig, box: Box):
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", ADD).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        status, headers, body = await wire.answer()
        assert status == 200
        assert "transfer-encoding" not in headers
        assert structured(body) == {"result": 3}
        assert await wire.ended()


@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_wish_for_another_protocol_is_ignored_and_the_body_is_read(rig: Rig, box: Box, pieces: int):
    request = modern("sb1_add", ADD, more="connection: upgrade, http2-settings\r\nupgrade: h2c\r\n")
    async with rig.connect() as wire:
        step = -(-len(request) // pieces)
        for start in range(0, len(request), step):
            await wire.send(request[start : start + step])
            await asyncio.sleep(0.01)
        status, _, body = await wire.answer()
        assert status == 200
        assert structured(body) == {"result": 3}
        await wire.send(b"GET /plain HTTP/1.1\r\nhost: hub\r\n\r\n")
        assert (await wire.answer())[0] == 200


async def test_a_websocket_handshake_is_an_ordinary_request(rig: Rig):
    head = b"GET /plain HTTP/1.1\r\nhost: hub\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    async with rig.connect() as wire:
        await wire.send(head)
        assert (await wire.answer())[0] == 200
        await wire.send(head)
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'[{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sb1_add"}}]',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sb1_add","arguments":[]}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sb2_add"}}',
        b'{"jsonrpc":"2.0","id":null,"method":"tools/call","params":{"name":"sb1_add"}}',
        b'{"jsonrpc":"2.0","method":"tools/call","params":{"name":"sb1_add"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"name":"sb1_add"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sb1_add","x":NaN}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"sb1_\xff"}}',
        b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
    ],
)
async def test_what_is_not_surely_a_call_to_a_sandbox_is_answered_by_the_hub(rig: Rig, box: Box, body: bytes):
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", body))
        status, headers, _ = await wire.answer()
    assert status == (202 if body and b'"id"' not in body and b"method" in body else 400)
    assert headers["ash-origin"] == "hub"
    assert box.heads == []


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    ("there", "twice"),
    [
        (b'"name": "sb1_add"', b'"name": "sb2_add", "name": "sb1_add"'),
        (b'"name": "sb1_add"', b'"n\\u0061me": "sb2_add", "name": "sb1_add"'),
        (b'"params"', b'"params": {"name": "sb2_add"}, "params"'),
        (b'"method"', b'"method": "tools/list", "method"'),
    ],
)
async def test_a_message_that_could_be_read_in_two_ways_is_refused(
    rig: Rig, box: Box, before: int, there: bytes, twice: bytes
):
    async with rig.connect() as wire:
        for _ in range(before):
            await wire.send(modern("sb1_add", ADD))
            assert (await wire.answer())[0] == 200
        await wire.send(modern("sb1_add", ADD.replace(there, twice, 1)))
        status, headers, body = await wire.answer()
        assert (status, headers["ash-origin"], kind(body)) == (400, "hub", "bad_request")
    assert len(box.heads) == before


async def test_a_repeated_deciding_header_is_left_to_the_hub(rig: Rig, box: Box):
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", ADD, more="mcp-name: sb1_add\r\n"))
        status, headers, _ = await wire.answer()
    assert (status, headers["ash-origin"]) == (400, "hub")
    assert box.heads == []


async def test_an_early_answer_of_the_hub_leaves_the_connection_in_order(rig: Rig):
    async with rig.connect() as wire:
        await wire.send(b"POST /early HTTP/1.1\r\nhost: hub\r\ncontent-length: 4\r\n\r\n")
        assert json.loads((await wire.answer())[2])["size"] == 0
        await wire.send(b"abcdGET /plain HTTP/1.1\r\nhost: hub\r\n\r\n")
        assert (await wire.answer())[0] == 200


async def test_stopping_lets_a_relayed_call_finish(rig: Rig, box: Box):
    async with rig.connect() as wire, anyio.create_task_group() as group:
        await wire.send(modern("sb1_wait", tool_call("sb1_wait")))
        with anyio.fail_after(10):
            await box.waiting.wait()
        rig.server.graceful = True
        rig.server.stop()
        group.start_soon(_end_soon, rig)
        status, headers, _ = await wire.answer()
        assert (status, headers["ash-origin"], headers["connection"]) == (200, "hub", "close")
        assert await wire.ended()


async def test_whoever_is_to_go_to_another_replica_is_told_so_with_the_next_answer(rig: Rig):
    for first, next_one in [(modern("sb1_add", ADD), modern("sb1_add", ADD)), (PLAIN, PLAIN)]:
        rig.relay.is_leaving = False
        async with rig.connect() as wire:
            for _ in range(2):  # the second is the same again, which is not parsed
                await wire.send(first)
                status, headers, _ = await wire.answer()
                assert (status, headers.get("connection")) == (200, None)
            rig.relay.is_leaving = True
            await wire.send(next_one)
            status, headers, _ = await wire.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await wire.ended()


async def _end_soon(rig: Rig) -> None:
    await rig.take_in(lambda connection: not connection._keep_alive)
    rig.ledger.abort_all(SandboxGone("the hive stops"))
