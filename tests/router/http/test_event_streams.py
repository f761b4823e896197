"""Events of a stream: cut where they end, changed where a sandbox asks something, otherwise passed as they came."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_mcp.types import DEFAULT_SCOPE, Endpoint, Principal, SessionName, new_sandbox_id
from ash_router.admission.base import Admitted
from ash_router.http.bodies import Message, read_message
from ash_router.http.event_stream import MAX_HELD_BYTES, EventSplitter
from ash_router.routes import Route
from ash_router.sessions.server_requests import MAX_ASKS, SessionEvents, answer_for_sandbox, find_resumed
from ash_router.sessions.session_map import LegacySession, UpstreamSession


def a_session() -> tuple[LegacySession, UpstreamSession]:
    session = LegacySession("hub", "hub", Admitted(Principal("me"), DEFAULT_SCOPE, "/mcp"), {}, "2025-11-25")
    return session, an_upstream(session)


def an_upstream(session: LegacySession) -> UpstreamSession:
    route = Route(
        sandbox_id=new_sandbox_id(),
        owner="me",
        scope=DEFAULT_SCOPE,
        session=SessionName("sb1"),
        endpoint=Endpoint(unix="/x"),
    )
    upstream = session.upstreams[route.sandbox_id] = UpstreamSession(route, b"theirs", b"2025-11-25")
    return upstream


def event(message: object, end: str = "\r\n", before: str = "event: message") -> bytes:
    text = message if isinstance(message, str) else json.dumps(message)
    return f"{before}{end}data: {text}{end}{end}".encode()


def data_of(raw: bytes) -> dict[str, Any]:
    (line,) = [line for line in raw.splitlines() if line.startswith(b"data:")]
    return json.loads(line[5:])


def asking(request_id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "method": "elicitation/create", "params": params}


def parsed(raw: bytes) -> Message:
    message = read_message(raw)
    assert message is not None
    return message


LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
EVENTS = st.lists(
    st.tuples(st.sampled_from(["data: x", "data: {}\u00e9", "event: a", ": ping", "id: 7", "retry: 3"]), LINE_ENDS)
)


@given(st.lists(st.tuples(EVENTS, LINE_ENDS)), st.lists(st.integers(1, 9)), st.booleans())
def test_whatever_the_pieces_all_bytes_pass_in_order(events: list[Any], sizes: list[int], cut: bool) -> None:
    raw = "".join("".join(map("".join, lines)) + end for lines, end in events).encode()
    whole = raw[:-1] if cut else raw
    seen: list[bytes] = []
    splitter = EventSplitter(lambda part: seen.append(part) or part)
    out, rest = b"", whole
    for size in sizes:
        out += splitter.feed(rest[:size], last=False)
        rest = rest[size:]
    out += splitter.feed(rest, last=True)
    assert out == whole
    assert all(b"\n\n" not in part[:-2] and b"\r\n\r\n" not in part[:-4] for part in seen)


def test_a_whole_event_is_edited_and_passed_at_once() -> None:
    splitter = EventSplitter(bytes.upper)
    assert splitter.feed(b"data: a\n\ndata: b", last=False) == b"DATA: A\n\n"
    assert not splitter.between_events
    assert splitter.feed(b"\n\n", last=False) == b"DATA: B\n\n"
    assert splitter.between_events


def test_a_long_answer_passes_as_it_comes() -> None:
    splitter = EventSplitter(lambda part: part)
    begin = b'event: message\r\ndata: {"jsonrpc":"2.0","id":7,"result":{"content":'
    assert splitter.feed(begin, last=False) == begin
    assert splitter.feed(b"x" * 100, last=False) == b"x" * 100
    assert not splitter.between_events
    assert splitter.feed(b"}}\r", last=False) == b"}}\r"
    assert splitter.feed(b"\n\r\ndata: half", last=False) == b"\n\r\n"


def test_what_is_held_is_bounded() -> None:
    splitter = EventSplitter(lambda part: part)
    assert splitter.feed(b"data: " + b"x" * 1000, last=False) == b""
    assert len(splitter.feed(b"x" * MAX_HELD_BYTES, last=False)) == MAX_HELD_BYTES + 1006


def cost_of(begin: bytes, read: bytes, reads: int) -> float:
    """Return the processor seconds that an event takes that comes in so many reads."""
    splitter = EventSplitter(lambda part: part)
    splitter.feed(begin, last=False)
    start = time.process_time()
    for _ in range(reads):
        splitter.feed(read, last=False)
    return time.process_time() - start


@pytest.mark.parametrize(("begin", "read"), [(b"data: ", b"x" * 1024), (b"id: ", b"x" * 1024), (b"", b"id:1\n" * 205)])
def test_eight_times_the_event_costs_about_eight_times_as_much(begin: bytes, read: bytes) -> None:
    costs = [(cost_of(begin, read, 120), cost_of(begin, read, 960)) for _ in range(5)]
    few, many = (min(column) for column in zip(*costs, strict=True))
    assert many < 24 * few  # 64 times, if each read costs as much as is held


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("request_id", [0, "a", 'quo"te', -5, "a\nb", "\\1", "\x01"])
def test_a_request_gets_an_id_of_the_hives_and_its_answer_the_sandboxs_own(end: str, request_id: Any) -> None:
    session, upstream = a_session()
    raw = event(asking(request_id, message="é?"), end)
    out = SessionEvents(session, upstream).feed(raw, last=False)
    given = data_of(out)["id"]
    assert out == raw.replace(b'"id": ' + json.dumps(request_id).encode(), b'"id": ' + json.dumps(given).encode(), 1)
    found = answer_for_sandbox(
        session, parsed(json.dumps({"jsonrpc": "2.0", "id": given, "result": {"n": 1.0}}).encode())
    )
    assert found is not None
    assert found[0] is upstream
    assert json.loads(found[1]) == {"jsonrpc": "2.0", "id": request_id, "result": {"n": 1.0}}
    assert session.asks == {}


def test_an_id_that_stands_in_the_arguments_too_stays_there() -> None:
    session, upstream = a_session()
    out = SessionEvents(session, upstream).feed(event(asking(1, nested={"id": 1})), last=False)
    message = data_of(out)
    assert message["params"] == {"nested": {"id": 1}}
    assert message["id"] in session.asks
    assert out.startswith(b"event: message\r\n")


def test_what_is_nested_too_deeply_to_be_written_anew_passes_as_it_came() -> None:
    session, upstream = a_session()
    raw = event(json.dumps(asking(1, nested={"id": 1})).replace("{}", "[" * 300 + "]" * 300))
    raw = raw.replace(b'"id": 1}', b'"id": 1, "x": ' + b"[" * 300 + b"]" * 300 + b"}", 1)
    assert SessionEvents(session, upstream).feed(raw, last=False) == raw
    assert session.asks == {}


def test_an_answer_is_given_back_once_and_only_to_who_asked() -> None:
    session, upstream = a_session()
    other = an_upstream(session)
    for asker in (upstream, other):
        SessionEvents(session, asker).feed(event(asking(1)), last=False)
    first, second = session.asks
    answered = parsed(json.dumps({"jsonrpc": "2.0", "id": second, "error": {"code": -1, "message": first}}).encode())
    found = answer_for_sandbox(session, answered)
    assert found is not None
    assert found[0] is other
    assert answer_for_sandbox(session, answered) is None
    assert list(session.asks) == [first]
    session.forget(upstream.route.sandbox_id)
    assert session.asks == {}


def test_a_request_is_withdrawn_under_the_id_that_the_client_knows() -> None:
    session, upstream = a_session()
    stream = SessionEvents(session, upstream)
    given = data_of(stream.feed(event(asking(4)), last=False))["id"]
    withdrawn = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 4, "reason": "x"}}
    told = data_of(stream.feed(event(withdrawn), last=False))
    assert told["params"] == {"requestId": given, "reason": "x"}
    assert session.asks == {}
    assert data_of(stream.feed(event(withdrawn), last=False)) == withdrawn


@pytest.mark.parametrize(
    "message",
    [
        {"jsonrpc": "2.0", "id": 1, "result": {"method": "x", "id": 1}},
        {"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "method"}},
        {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"id": 1}},
        {"jsonrpc": "2.0", "method": "ping", "id": None},
        {"jsonrpc": "2.0", "method": 1, "id": 1},
        [asking()],
        "half {",
        "",
    ],
)
def test_what_is_no_request_passes_as_it_came(message: Any) -> None:
    session, upstream = a_session()
    raw = event(message)
    assert SessionEvents(session, upstream).feed(raw, last=False) == raw
    assert session.asks == {}


def test_unanswered_requests_are_bounded() -> None:
    session, upstream = a_session()
    stream = SessionEvents(session, upstream)
    for number in range(MAX_ASKS + 5):
        stream.feed(event(asking(number)), last=False)
    assert [ask.request_id for ask in session.asks.values()] == list(range(5, MAX_ASKS + 5))


def test_event_ids_say_whose_they_are_and_lead_back() -> None:
    session, upstream = a_session()
    other = an_upstream(session)
    raw = event({"jsonrpc": "2.0", "method": "x"}, "\n", "id: 1_2") + b"id: 7\ndata:\n\n" + b"data: id: 8\n\n"
    out = SessionEvents(session, other).feed(raw, last=False)
    name = f"{other.route.sandbox_id}.".encode()
    assert out == raw.replace(b"id: 1_2", b"id: " + name + b"1_2").replace(b"id: 7", b"id: " + name + b"7")
    assert find_resumed(session, name + b"1_2") == (other, b"1_2")
    assert find_resumed(session, name) is None
    assert find_resumed(session, b"7") is None
    assert upstream is not other


def test_the_id_of_a_long_answers_event_says_whose_it_is_too() -> None:
    session, upstream = a_session()
    begin = b'id: 3\nevent: message\ndata: {"jsonrpc":"2.0","id":"a","result":{'
    out = SessionEvents(session, upstream).feed(begin, last=False)
    assert out == begin.replace(b"id: 3", f"id: {upstream.route.sandbox_id}.3".encode(), 1)
