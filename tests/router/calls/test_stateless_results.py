"""Answers of the handshake era become results of the stateless era, however they come in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ash_router.calls.stateless_results import MAX_HELD_BYTES, StatelessResults

RESULT = {"content": [{"type": "text", "text": '{"result":{"a":1}}\n\ndata: {"result":{"b":2}}'}]}
TYPED = {"resultType": "complete", **RESULT}
PROGRESS = (
    b'event: message\r\ndata: {"jsonrpc":"2.0","method":"notifications/progress","params":{"result":{"a":1}}}\r\n\r\n'
)
ORDERS: list[dict[str, Any]] = [
    {"jsonrpc": "2.0", "id": 7, "result": RESULT},
    {"result": RESULT, "jsonrpc": "2.0", "id": 'a"b\\'},
    {"id": None, "jsonrpc": "2.0", "result": RESULT},
]


def fed(data: bytes, size: int, *, is_stream: bool) -> bytes:
    """Return what comes of an answer that comes in pieces of so many bytes."""
    editor, out = StatelessResults(is_stream), b""
    for begin in range(0, len(data), size):
        out += editor.feed(data[begin : begin + size], last=begin + size >= len(data))
    assert editor.between_events or is_stream
    return out


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("message", ORDERS)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_answer_says_its_type(message: dict[str, Any], size: int, indent: int | None) -> None:
    out = fed(json.dumps(message, indent=indent).encode(), size, is_stream=False)
    assert json.loads(out) == {**message, "result": TYPED}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("message", ORDERS)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_answer_in_a_stream_says_its_type_and_nothing_else_is_changed(
    message: dict[str, Any], size: int, separators: tuple[str, str], end: bytes
) -> None:
    before = b"id: 1" + end + b"data: " + end * 2 + PROGRESS
    data = json.dumps(message, separators=separators).encode()
    out = fed(before + b"id: 2" + end + b"data: " + data + end * 2, size, is_stream=True)
    assert out.startswith(before + b"id: 2" + end + b"data: ") and out.endswith(end * 2)
    answer = out.removeprefix(before + b"id: 2" + end + b"data: ")
    assert json.loads(answer) == {**message, "result": TYPED}


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"2.0","id":1,"error":{"code":-32602,"message":"no","data":{"result":{"a":1}}}}',
        b'{"jsonrpc":"2.0","id":1,"result":{}}',
        b'{"jsonrpc":"2.0","id":1,"result":[]}',
        b"not json",
        b"",
        b'{"id":"' + b"x" * 2 * MAX_HELD_BYTES + b'","result":{"a":1}}',
    ],
)
@pytest.mark.parametrize("size", [1, 10_000])
def test_what_is_no_result_that_could_have_a_type_passes_as_it_is(body: bytes, size: int) -> None:
    assert fed(body, size, is_stream=False) == body
    assert fed(b"data: " + body + b"\n\n", size, is_stream=True) == b"data: " + body + b"\n\n"


def test_a_long_answer_is_not_held_once_its_result_has_begun() -> None:
    for is_stream, begin in ((False, b""), (True, b"event: message\r\ndata: ")):
        editor = StatelessResults(is_stream)
        out = editor.feed(begin + b'{"jsonrpc":"2.0","id":1,"result":{"content":', last=False)
        assert out == begin + b'{"jsonrpc":"2.0","id":1,"result":{"resultType":"complete","content":'
        assert editor.feed(b"x" * 5000, last=False) == b"x" * 5000
