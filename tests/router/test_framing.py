"""Heads and bodies framed anew: whatever is put in, nothing comes out that could be read as something else."""

from __future__ import annotations

from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_router import _framing
from ash_router._framing import ResponseHead

NAMES = st.text(max_size=40)
TOKENS = st.from_regex(rb"[a-z-]{1,20}", fullmatch=True)
VALUES = st.binary(max_size=30).filter(lambda value: not set(value) & set(b"\r\n\x00"))


class Parsed:
    """What a strict parser makes of bytes."""

    def __init__(self, data: bytes, parser: Any) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.complete = 0
        parser(self).feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete += 1


@given(NAMES)
def test_a_name_survives_its_header_and_never_ends_it(name: str):
    value = _framing.encode_name(name)
    assert all(0x20 <= byte <= 0x7E for byte in value)
    assert _framing.decode_name(value) == name


@pytest.mark.parametrize(
    "value", [b"=?base64?!!?=", b"=?base64?YR==?=", b"=?base64?YQ==?=", b"\xe4", b"=?base64?/w==?="]
)
def test_a_name_that_is_written_another_way_is_none(value: bytes):
    assert _framing.decode_name(value) is None


@given(st.lists(st.tuples(TOKENS, VALUES), max_size=8), NAMES, st.binary(max_size=50))
def test_a_request_of_ours_is_one_request_whatever_its_caller_sent(
    headers: list[tuple[bytes, bytes]], name: str, body: bytes
):
    sent = [
        (key, value) for key, value in headers if _framing.check_head("1.1", b"POST", b"/mcp", [(key, value)]) is None
    ]
    passed = _framing.asked_lines(sent, _framing.TO_CALL - {b"mcp-name", b"mcp-method"})
    ours = _framing.lines_of([(b"ash-token", b"t"), (b"mcp-name", _framing.encode_name(name))])
    parsed = Parsed(_framing.request_head(b"POST", len(body), passed, ours) + body, httptools.HttpRequestParser)
    assert parsed.complete == 1
    assert parsed.body == body
    keys = [key for key, _ in parsed.headers]
    assert keys.count(b"content-length") == keys.count(b"ash-token") == keys.count(b"host") == 1
    assert b"transfer-encoding" not in keys and b"mcp-method" not in keys


def test_a_caller_cannot_send_the_headers_that_are_ours():
    theirs = [
        (b"ash-token", b"forged"),
        (b"mcp-name", b"forged"),
        (b"host", b"forged"),
        (b"mcp-session-id", b"forged"),
    ]
    assert _framing.asked_lines(theirs, _framing.TO_CALL - {b"mcp-name"}) == b""


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"5")], None),
        ([(b"content-length", b"5"), (b"content-length", b"5")], 400),
        ([(b"content-length", b"5"), (b"transfer-encoding", b"chunked")], 400),
        ([(b"content-length", b"-5")], 400),
        ([(b"content-length", b"5,5")], 400),
        ([(b"content-length", b"0x5")], 400),
        ([(b"content-length", b"9" * 30)], 400),
        ([(b"transfer-encoding", b" Chunked ")], None),
        ([(b"transfer-encoding", b"chunked, chunked")], 400),
        ([(b"transfer-encoding", b"xchunked")], 400),
        ([(b"x", b"a\x0bb")], 400),
    ],
)
def test_lengths_and_codings_are_checked_also_without_the_parser(headers: list[tuple[bytes, bytes]], status: Any):
    problem = _framing.check_head("1.1", b"POST", b"/mcp", headers)
    assert (problem and problem.status) == status


@pytest.mark.parametrize(
    "target", [b"*", b"mcp", b"", b"http://hub/mcp", b"/mcp#x", b"/m cp", b"/m\x7f", b"/\xc3\xa4"]
)
def test_a_target_must_be_a_path(target: bytes):
    problem = _framing.check_head("1.1", b"GET", target, [])
    assert problem is not None and problem.status == 400


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=6))
def test_chunks_hold_what_was_put_in(parts: list[bytes]):
    head = _framing.status_line(200) + b"transfer-encoding: chunked\r\n\r\n"
    data = head + b"".join(map(_framing.chunk, parts)) + _framing.LAST_CHUNK
    parsed = Parsed(data, httptools.HttpResponseParser)
    assert (parsed.body, parsed.complete) == (b"".join(parts), 1)


def read_events(stream: bytes) -> list[tuple[str, str]]:
    """Read an event stream as the standard says: type and data of each event that is dispatched."""
    events: list[tuple[str, str]] = []
    kind, data = "message", list[str]()
    text = stream.decode().replace("\r\n", "\n").replace("\r", "\n")
    for line in text.split("\n")[:-1]:
        if not line:
            if data:
                events.append((kind, "\n".join(data)))
            kind, data = "message", []
            continue
        field, _, value = line.partition(":")
        if field == "event":
            kind = value.removeprefix(" ")
        elif field == "data":
            data.append(value.removeprefix(" "))
    return events


WHOLE = "event: message{0}id: 1{0}data: {{}}{0}{0}"


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.integers(0, 80), st.integers(1, 7))
def test_an_event_appended_to_a_cut_stream_is_read_and_the_cut_one_is_not(newline: str, cut: int, step: int):
    stream = (WHOLE.format(newline) * 2).encode()[:cut]
    tail = b""
    for start in range(0, len(stream), step):
        tail = _framing.sse_tail(tail, stream[start : start + step])
    events = read_events(stream + _framing.sse_event(tail, b'{"ours":1}'))
    messages = [data for kind, data in events if kind == "message"]
    assert messages[-1] == '{"ours":1}'
    whole = [event for event in read_events(stream) if event[0] == "message"]
    assert messages[:-1] == ["{}"] * len(messages[:-1])
    assert len(messages) - 1 >= len(whole) - 1


@pytest.mark.parametrize(
    ("status", "headers", "fine"),
    [
        (200, [], True),
        (404, [], True),
        (500, [(b"content-encoding", b"identity")], True),
        (199, [], False),
        (600, [], False),
        (307, [], False),
        (401, [], False),
        (200, [(b"content-encoding", b"br")], False),
        (200, [(b"x", b"a\x00")], False),
        (200, [(b"transfer-encoding", b"gzip")], False),
    ],
)
def test_an_answer_that_cannot_be_passed_on_is_named(status: int, headers: list[tuple[bytes, bytes]], fine: bool):
    assert (_framing.response_problem(ResponseHead(status, headers)) is None) is fine
