"""What is known of a head, and how one that comes again is told: never where another parser would see another one."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ash_router.http import framing
from ash_router.http.heads import RequestHead, SameHead

HEAD = b"POST /mcp HTTP/1.1\r\nhost: hub\r\ncontent-length: %d\r\nx-a: b\r\n\r\n"


def message(body: bytes) -> bytes:
    return HEAD % len(body) + body


def same(raw: bytes) -> SameHead:
    found = SameHead.of(raw)
    assert found is not None
    return found


@pytest.mark.parametrize("body", [b"{}", b"x" * 99, b"x" * 100, b"\r\n\r\n", b"content-length: 3\r\n\r\n"])
def test_a_message_with_the_same_head_is_known_whatever_its_body(body: bytes) -> None:
    assert same(message(b"{}")).body_of(message(body)) == body


@pytest.mark.parametrize(
    "raw",
    [
        HEAD % 3 + b"ab",
        HEAD % 1 + b"ab",
        HEAD % 0,
        HEAD % 2,
        (HEAD % 2)[:-2] + b"ab",
        b"POST / HTTP/1.1\r\nhost: hub\r\n\r\n",
        b"POST / HTTP/1.1\r\nx: content-length: 2\r\n\r\nab",
        b"",
        b"\r\n\r\n",
    ],
)
def test_what_is_not_one_whole_message_with_a_length_tells_nothing(raw: bytes) -> None:
    assert SameHead.of(raw) is None


@pytest.mark.parametrize(
    "raw",
    [
        HEAD % 3 + b"ab",
        HEAD % 1 + b"ab",
        HEAD.replace(b"%d", b"02") + b"ab",
        HEAD.replace(b"%d", b"+2") + b"ab",
        HEAD.replace(b"%d", b"2 ") + b"ab",
        HEAD.replace(b"%d", b" 2") + b"ab",
        HEAD.replace(b"%d", b"") + b"ab",
        HEAD.replace(b"x-a: b", b"x-a: c") % 2 + b"ab",
        HEAD.replace(b"x-a: b", b"content-length: 2") % 2 + b"ab",
        HEAD.replace(b"x-a: b", b"x-a: b\r\n more") % 2 + b"ab",
        HEAD.replace(b"\r\n", b"\n") % 2 + b"ab",
        b"\r\n" + HEAD % 2 + b"ab",
        (HEAD % 2)[:20],
        b"",
    ],
)
def test_another_head_or_half_a_message_is_not_taken_for_it(raw: bytes) -> None:
    assert same(message(b"{}")).body_of(raw) is None


@pytest.mark.parametrize(
    ("raw", "known"),
    [
        (HEAD % 2, True),
        (HEAD % 123, True),
        (HEAD % 2 + b"a", False),
        (HEAD.replace(b"%d", b"02"), False),
        (HEAD.replace(b"%d", b""), False),
        (HEAD.replace(b"%d", b"2\r\nx: y"), False),
        ((HEAD % 2)[:-1], False),
        (b"", False),
    ],
)
def test_a_head_alone_is_known_too(raw: bytes, known: bool) -> None:
    assert same(message(b"{}")).is_head_of(raw) is known


NAMES = st.sampled_from([b"host", b"x-a", b"Content-Length", b"accept", b"transfer-encoding"])
HEADERS = st.lists(st.tuples(NAMES, st.binary(max_size=6)), max_size=4)
LENGTH = st.sampled_from([b"content-length: %d", b"Content-Length:%d", b"CONTENT-LENGTH: \t%d"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    lines = [b"%b: %b" % header for header in draw(HEADERS)]
    body = draw(st.binary(max_size=12))
    lines.insert(draw(st.integers(0, len(lines))), draw(LENGTH) % len(body))
    return b"POST /mcp HTTP/1.1\r\nhost: hub\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


@given(messages(), st.data())
@example(message(b"ab"), None)
def test_what_is_known_again_is_what_a_parser_reads(first: bytes, data: st.DataObject | None) -> None:
    known = SameHead.of(first)
    if known is None or h11_of(first) is None:
        return
    second = message(b"cde")
    if data is not None:
        place, put = (
            data.draw(st.integers(0, len(first))),
            data.draw(st.sampled_from([b"", b"\r\n", b"0", b"1", b"ab"])),
        )
        second = first[:place] + put + first[place + data.draw(st.integers(0, 3)) :]
    body = known.body_of(second)
    if body is None:
        return
    read, expected = h11_of(second), h11_of(first)
    assert read is not None and expected is not None
    assert read[1] == body

    def others(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        return [header for header in headers if header[0] != b"content-length"]

    assert others(read[0]) == others(expected[0])


def h11_of(raw: bytes) -> tuple[list[tuple[bytes, bytes]], bytes] | None:
    """Return headers and body as h11 reads them; None for what is not one whole message."""
    connection = h11.Connection(h11.SERVER)
    try:
        connection.receive_data(raw)
        head = connection.next_event()
        if not isinstance(head, h11.Request):
            return None
        body = b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError:
        return None
    whole = isinstance(event, h11.EndOfMessage) and connection.trailing_data[0] == b""
    return (list(head.headers), body) if whole else None


def test_what_is_worked_out_of_a_head_is_so_once() -> None:
    headers = [(b"mcp-name", b"sb1_add"), (b"accept", b"a"), (b"mcp-param-x", b"y"), (b"cookie", b"c")]
    head = RequestHead("1.1", b"POST", b"/mcp", headers)
    assert head.tool == "sb1_add"
    assert head.fields is head.fields
    assert head.lines(framing.TO_CALL) == b"mcp-name: sb1_add\r\naccept: a\r\nmcp-param-x: y\r\n"
    assert head.lines(framing.TO_CALL) is head.lines(framing.TO_CALL)
    assert head.lines(framing.TO_CALL - {b"mcp-name"}) == b"accept: a\r\nmcp-param-x: y\r\n"
    assert head.is_same("1.1", b"POST", b"/mcp", list(headers))
    assert not head.is_same("1.1", b"POST", b"/mcp", headers[1:])
