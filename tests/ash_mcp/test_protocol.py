"""Requests to bytes and bytes to messages, by the MCP SDK's own measure."""

from __future__ import annotations

import importlib.metadata
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.inbound import InboundModernRoute, classify_inbound_request, decode_header_value
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

import ash_mcp
from ash_mcp._protocol import EventDecoder, EventTooLarge, build_request, parse_message
from ash_mcp.wire import MODERN_VERSION


def test_version_is_one_that_the_mcp_sdk_serves():
    assert MODERN_VERSION in MODERN_PROTOCOL_VERSIONS
    assert ash_mcp.__version__ == importlib.metadata.version("ash-mcp")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_every_request_passes_the_servers_ladder(name: str, progress: bool):
    request = build_request("tools/call", {"name": name, "arguments": {}}, request_id=7, progress=progress)
    body = json.loads(request.body)
    route = classify_inbound_request(body, headers=request.headers)
    assert isinstance(route, InboundModernRoute)
    assert route.client_info["name"] == "ash-mcp"
    assert decode_header_value(request.headers["mcp-name"]) == name
    assert body["params"]["_meta"].get("progressToken") == (7 if progress else None)
    assert all(0x20 <= ord(char) < 0x7F for value in request.headers.values() for char in value)


@pytest.mark.parametrize("bad", [float("nan"), object(), "\ud800"], ids=["nan", "object", "surrogate"])
def test_what_json_cannot_say_is_not_sent(bad: object):
    with pytest.raises((TypeError, ValueError)):
        build_request("tools/call", {"name": "x", "arguments": {"a": bad}}, request_id=1)


@given(
    st.lists(st.lists(st.text("ab: \u00e9", max_size=5), min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 200)),
)
def test_events_are_the_same_however_the_bytes_are_cut(events: list[list[str]], newline: str, cuts: list[int]):
    lines: list[str] = [": comment", "id: 1", "retry"]
    for event in events:
        lines += ["event: message", *(f"data: {line}" for line in event), ""]
    # A last line that ends in a lone CR is known to end only by what follows.
    data = (newline.join([*lines, ": end"]) + newline).encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    decoder = EventDecoder(max_event_bytes=1000)
    found = [event for start, end in itertools.pairwise(places) for event in decoder.feed(data[start:end])]
    assert found == ["\n".join(event).encode() for event in events]


def test_unfinished_event_over_the_bound_is_refused_and_finished_ones_are_forgotten():
    decoder = EventDecoder(max_event_bytes=20)
    for _ in range(10):
        assert list(decoder.feed(b"data: 0123456789\n\n")) == [b"0123456789"]
    with pytest.raises(EventTooLarge):
        for _ in range(10):
            list(decoder.feed(b"data: 0123456789\n"))
    with pytest.raises(EventTooLarge):
        list(EventDecoder(max_event_bytes=20).feed(b"x" * 21))


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 100_000], ids=str)
def test_what_is_no_object_is_no_message(data: bytes):
    assert parse_message(data) is None
