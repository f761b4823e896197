"""Heads and bodies framed anew: whatever is put in, nothing comes out that could be read as something else."""

from __future__ import annotations

from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_router.http import framing
from ash_router.http.framing import ResponseHead

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
    value = framing.encode_name(name)
    assert all(0x20 <= byte <= 0x7E for byte in value)
    assert framing.decode_name(value) == name


@pytest.mark.parametrize(
    "value", [b"=?base64?!!?=", b"=?base64?YR==?=", b"=?base64?YQ==?=", b"\xe4", b"=?base64?/w==?="]
)
def test_a_name_that_is_written_another_way_is_none(value: bytes):
    assert framing.decode_name(value) is None


@pytest.mark.parametrize("value", [b"abc?=", b"abc", b"a b", b"a-b"])
def test_a_plain_name_is_written_and_read_as_it_is(value: bytes):
    assert framing.decode_name(value) == value.decode()
    assert framing.encode_name(value.decode()) == value


@pytest.mark.parametrize("name", ["=?base64?YQ==?=", " a", "a ", "\u00e4", "a\r\nb"])
def test_a_name_that_would_be_read_as_another_is_marked(name: str):
    assert framing.encode_name(name).startswith(b"=?base64?")


@given(st.lists(st.tuples(TOKENS, VALUES), max_size=8), NAMES, st.binary(max_size=50))
def test_a_request_of_ours_is_one_request_whatever_its_caller_sent(
    headers: list[tuple[bytes, bytes]], name: str, body: bytes
):
    sent = [
        (key, value) for key, value in headers if framing.check_head("1.1", b"POST", b"/mcp", [(key, value)]) is None
    ]
    passed = framing.asked_lines(sent, framing.TO_CALL - {b"mcp-name", b"mcp-method"})
    ours = framing.lines_of([(b"ash-token", b"t"), (b"mcp-name", framing.encode_name(name))])
    parsed = Parsed(
        framing.request_head(b"POST", "sandbox", len(body), passed, ours) + body, httptools.HttpRequestParser
    )
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
    assert framing.asked_lines(theirs, framing.TO_CALL - {b"mcp-name"}) == b""


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
    problem = framing.check_head("1.1", b"POST", b"/mcp", headers)
    assert (problem and problem.status) == status


@pytest.mark.parametrize(
    "target", [b"*", b"mcp", b"", b"http://hub/mcp", b"/mcp#x", b"/m cp", b"/m\x7f", b"/\xc3\xa4"]
)
def test_a_target_must_be_a_path(target: bytes):
    problem = framing.check_head("1.1", b"GET", target, [])
    assert problem is not None and problem.status == 400


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=6))
def test_chunks_hold_what_was_put_in(parts: list[bytes]):
    head = framing.status_line(200) + b"transfer-encoding: chunked\r\n\r\n"
    data = head + b"".join(map(framing.chunk, parts)) + framing.LAST_CHUNK
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
        tail = framing.sse_tail(tail, stream[start : start + step])
    events = read_events(stream + framing.sse_event(tail, b'{"ours":1}'))
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
        (407, [], False),
        (200, [(b"content-encoding", b"br")], False),
        (200, [(b"x", b"a\x00")], False),
        (200, [(b"transfer-encoding", b"gzip")], False),
    ],
)
def test_an_answer_that_cannot_be_passed_on_is_named(status: int, headers: list[tuple[bytes, bytes]], fine: bool):
    assert (framing.response_problem(ResponseHead(status, headers)) is None) is fine


@pytest.mark.parametrize(("status", "fine"), [(299, True), (300, False), (399, False), (400, True), (402, True)])
def test_each_redirect_and_nothing_else_near_it_is_refused(status: int, fine: bool):
    assert (framing.response_problem(ResponseHead(status, [])) is None) is fine


@pytest.mark.parametrize("status", [200, 400, 406, 408, 599])
def test_an_answer_with_a_status_between_those_that_are_refused_passes(status: int):
    assert framing.response_problem(ResponseHead(status, [])) is None


def test_every_problem_of_an_answer_says_what_it_is():
    said = framing.response_problem(ResponseHead(302, []))
    assert said is not None and "redirect (302)" in said


@pytest.mark.parametrize(
    ("kind", "encoding", "status"),
    [
        (b"application/json", None, None),
        (b"application/json", b"identity", None),
        (b"application/json", b"Identity", None),
        (b'Application/JSON ; charset="UTF-8"', None, None),
        (b"application/json;charset=utf-8", None, None),
        (b"application/json", b"gzip", 400),
        (b"application/json; charset=latin-1", None, 400),
        (b"application/jsonp", None, 400),
        (b"text/plain", None, 400),
        (None, None, 400),
    ],
)
def test_a_message_is_json_in_utf_8_as_it_is(kind: bytes | None, encoding: bytes | None, status: int | None):
    problem = framing.content_problem({b"content-type": kind, b"content-encoding": encoding})
    assert (problem and problem.status) == status


@pytest.mark.parametrize(
    ("name", "status"),
    [(b"host", 400), (b"authorization", 400), (b"mcp-anything", 400), (b"ash-scope", 400), (b"accept", None)],
)
def test_what_says_who_asks_for_what_comes_once(name: bytes, status: int | None):
    once, twice = (framing.check_head("1.1", b"POST", b"/mcp", [(name, b"a")] * count) for count in (1, 2))
    assert once is None and (twice and twice.status) == status


@pytest.mark.parametrize(
    ("version", "method", "headers", "status"),
    [
        ("1.0", b"GET", [], None),
        ("1.0", b"POST", [(b"transfer-encoding", b"chunked")], 400),
        ("1.0", b"POST", [(b"content-length", b"1")], None),
        ("2.0", b"GET", [], 505),
        ("1.1", b"CONNECT", [], 400),
        ("1.1", b"POST", [(b"content-length", b"1" * 18)], None),
        ("1.1", b"POST", [(b"content-length", b"1" * 19)], 400),
    ],
)
def test_versions_methods_and_lengths_at_their_edges(
    version: str, method: bytes, headers: list[tuple[bytes, bytes]], status: int | None
):
    problem = framing.check_head(version, method, b"/mcp", headers)
    assert (problem and problem.status) == status


def test_a_header_is_found_where_it_occurs_once():
    headers = [(b"a", b" 1 "), (b"b", b"2"), (b"b", b"3")]
    assert [framing.one(headers, name) for name in (b"a", b"b", b"c")] == [b"1", None, None]
    assert framing.indexed([*headers, (b"c", b" 4")]) == {b"a": b"1", b"b": None, b"c": b"4"}


@pytest.mark.parametrize(("value", "length"), [(b" 12 ", 12), (b"0", 0), (b"", None), (b"+1", None)])
def test_a_length_is_digits(value: bytes, length: int | None):
    assert framing.content_length([(b"content-length", value)]) == length
    assert framing.content_length([]) is None


@pytest.mark.parametrize(
    ("headers", "follows"),
    [
        ([], False),
        ([(b"accept", b"0")], False),
        ([(b"content-length", b" 0 ")], False),
        ([(b"content-length", b"1")], True),
        ([(b"transfer-encoding", b"chunked")], True),
    ],
)
def test_a_body_follows_a_length_or_a_coding(headers: list[tuple[bytes, bytes]], follows: bool):
    assert framing.has_body(headers) is follows


def test_the_head_of_a_body_says_only_how_it_is_framed():
    headers = [(b"host", b"x"), (b"content-length", b"5"), (b"transfer-encoding", b"chunked")]
    framed = b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
    assert framing.body_head(headers) == framed


def test_an_answers_head_shows_what_is_kept_of_it_to_whoever_asks():
    head = ResponseHead(200, [(b"content-type", b"Text/Event-Stream"), (b"set-cookie", b"x"), (b"vary", b"y")])
    kind = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream\r\n"
    some, more = frozenset({b"content-type"}), frozenset({b"content-type", b"vary"})
    assert [head.lines(kept) for kept in (some, some, more)] == [kind, kind, kind + b"vary: y\r\n"]
    assert (head.is_stream, head.length) == (True, None)
    assert not ResponseHead(200, []).is_stream and not ResponseHead(200, [(b"content-type", b"x")]).is_stream
    assert ResponseHead(200, [(b"content-length", b"7")]).length == 7


def test_a_request_without_a_length_comes_in_chunks():
    assert b"\r\ntransfer-encoding: chunked\r\n" in framing.request_head(b"POST", "sandbox", None)
    assert b"content-length" not in framing.request_head(b"POST", "sandbox", None)


def test_a_sandbox_is_told_for_whom_its_hive_asks():
    told = b"x-forwarded-for: 10.0.0.7\r\nx-forwarded-proto: https\r\n"
    assert framing.forwarded([], "10.0.0.7", "https") == told
    assert framing.forwarded([(b"host", b"hive")], "10.0.0.7", "https") == told + b"x-forwarded-host: hive\r\n"


@pytest.mark.parametrize(
    ("tail", "data", "kept"),
    [
        (b"", b"a", b"a"),
        (b"ab", b"c", b"abc"),
        (b"abcd", b"ef", b"cdef"),
        (b"a", b"bcd", b"abcd"),
        (b"a", b"bcdefg", b"defg"),
    ],
)
def test_the_last_four_bytes_of_a_stream_are_remembered(tail: bytes, data: bytes, kept: bytes):
    assert framing.sse_tail(tail, data) == kept


@pytest.mark.parametrize(
    ("status", "line"),
    [(200, b"HTTP/1.1 200 OK\r\n"), (404, b"HTTP/1.1 404 Not Found\r\n"), (599, b"HTTP/1.1 599 \r\n")],
)
def test_a_status_has_its_phrase_if_it_has_one(status: int, line: bytes):
    assert framing.status_line(status) == line


def test_what_is_passed_on_is_all_but_framing_what_is_of_one_connection_and_our_own() -> None:
    headers = (
        (b"accept", b"*/*"),
        (b"connection", b"close, X-Once"),
        (b"x-once", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"ash-origin", b"hub"),
        (b"cookie", b"a=b"),
        (b"x-more", b"2"),
    )
    assert framing.passed_lines(headers) == b"accept: */*\r\ncookie: a=b\r\nx-more: 2\r\n"
    assert framing.passed_lines(headers, but=frozenset([b"cookie"])) == b"accept: */*\r\nx-more: 2\r\n"


@pytest.mark.parametrize(
    ("tail", "is_between"),
    [(b"", True), (b"a\n\n", True), (b"a\r\r", True), (b"\r\n\r\n", True), (b"a: b\n", False), (b"a: b", False)],
)
def test_a_stream_stands_between_two_events_at_its_begin_and_after_an_empty_line(
    tail: bytes, is_between: bool
) -> None:
    assert framing.between_events(tail) is is_between


@pytest.mark.parametrize(
    ("kind", "is_json", "is_stream"),
    [
        (b"Application/JSON; charset=utf-8", True, False),
        (b"text/event-stream", False, True),
        (b"text/plain", False, False),
    ],
)
def test_a_response_is_json_or_a_stream_by_its_content_type(kind: bytes, is_json: bool, is_stream: bool) -> None:
    head = ResponseHead(200, ((b"content-type", kind),))
    assert (head.is_json, head.is_stream) == (is_json, is_stream)
