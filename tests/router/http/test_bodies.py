"""Bodies rewritten: the name changes, and nothing else does."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_router.http import bodies
from ash_router.http.bodies import ToolCall

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "a", "params"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def body(name: str, arguments: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": name, "arguments": arguments, **more},
    }


def call(raw: bytes) -> ToolCall:
    message = bodies.read_message(raw)
    assert message is not None
    found = bodies.as_tool_call(message)
    assert found is not None
    return found


def renamed(raw: bytes, name: str = "tool") -> bytes:
    new = bodies.rename(call(raw), name)
    assert new is not None
    return new


@given(st.dictionaries(st.sampled_from(["name", "x"]), JSON, max_size=2), st.booleans(), st.text(max_size=5))
def test_renaming_changes_the_name_and_nothing_else(arguments: dict[str, Any], ascii_only: bool, tail: str):
    name = f"sb1_{tail}".encode("utf-8", "ignore").decode()
    before = body(name, arguments, _meta={"name": name})
    raw = json.dumps(before, ensure_ascii=ascii_only).encode()
    assert json.loads(renamed(raw, "other")) == body("other", arguments, _meta={"name": name})


@given(st.dictionaries(st.sampled_from(["name", "x"]), JSON, max_size=2))
def test_retargeting_keeps_the_inner_arguments(arguments: dict[str, Any]):
    outer = {"session": "sb1", "tool": "add", "arguments": arguments}
    raw = json.dumps(body("call", outer, _meta={"progressToken": 7})).encode()
    new = bodies.retarget(call(raw), "add")
    assert new is not None
    assert json.loads(new) == body("add", arguments, _meta={"progressToken": 7})


@st.composite
def spelled(draw: st.DrawFn, value: Any) -> str:
    """One of the many ways to write `value` in JSON."""
    space = draw(st.sampled_from(["", "", " ", "\n\t", " \r"]))
    if isinstance(value, str):
        odd = draw(st.none() | st.sampled_from(range(len(value) + 1)))
        said = "".join(
            draw(st.sampled_from(spellings(char)[-1 if at != odd else 0 :])) for at, char in enumerate(value)
        )
        said = f'"{said}"'
    elif isinstance(value, list):
        said = "[" + ",".join(draw(spelled(item)) for item in cast("list[Any]", value)) + "]"
    elif isinstance(value, dict):
        members = draw(st.permutations(list(cast("dict[str, Any]", value).items())))
        said = "{" + ",".join(f"{draw(spelled(key))}:{draw(spelled(item))}" for key, item in members) + "}"
    else:
        said = json.dumps(value)
    return f"{space}{said}{space}"


def spellings(character: str) -> list[str]:
    units = character.encode("utf-16-be")
    escaped = "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
    return [escaped, *(["\\/"] if character == "/" else []), json.dumps(character, ensure_ascii=False)[1:-1]]


def exactly(raw: str | bytes) -> Any:
    """What is read, with every number as it is written."""
    return json.loads(raw, parse_int=lambda number: ("number", number), parse_float=lambda number: ("number", number))


DECOYS = st.sampled_from(["name", "params", "method", 'x"name', "name\\", "sb1_x", '"name":"sb1_x"', "a:b"])
LOOKALIKES = st.recursive(
    JSON | DECOYS | st.sampled_from(["sb1_x", {"name": "sb1_x"}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(DECOYS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["sb1_x", "sb1_x", "sb1_a/b", 'sb1_"name":"x', "sb1_\u00e9\U0001f41d", "sb1_\n"])


@given(st.data(), NAMES, NAMES, st.dictionaries(DECOYS, LOOKALIKES, max_size=3), LOOKALIKES)
def test_however_a_call_is_written_its_name_is_replaced_and_nothing_else(
    data: st.DataObject, old: str, new: str, arguments: dict[str, Any], more: Any
):
    before = {**body(old, arguments, _meta={"name": old, "params": more}), "more": more}
    raw = data.draw(spelled(before))
    expected = exactly(raw)
    expected["params"]["name"] = new
    assert exactly(renamed(raw.encode(), new)) == expected


def twice(raw: bytes) -> bool:
    """Whether an object in the message holds a key twice, as Python's own reader sees it."""
    found: list[bool] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    json.loads(raw, object_pairs_hook=look)
    return any(found)


@given(st.data(), st.lists(st.tuples(DECOYS, LOOKALIKES), max_size=4), st.lists(st.tuples(DECOYS, LOOKALIKES)))
def test_a_message_that_holds_a_key_twice_is_not_read_and_any_other_is(
    data: st.DataObject, fields: list[Any], params: list[Any]
):
    def members(pairs: list[Any]) -> str:
        return "{" + ",".join(f"{data.draw(spelled(key))}:{value}" for key, value in pairs) + "}"

    inner = members([(key, data.draw(spelled(value))) for key, value in params])
    outer = [(key, data.draw(spelled(value))) for key, value in fields]
    raw = members([*outer, ("params", inner)]).encode()
    assert (bodies.read_message(raw) is None) is twice(raw)


@pytest.mark.parametrize(
    ("raw", "ambiguous"),
    [
        (b'{"method":"a","m\\u0065thod":"b"}', True),
        (b'{"params":{"name":"a","name":"a"}}', True),
        (b'{"params":{"name":"a","n\\u0061me":"a","x":"\\u003a"}}', True),
        (b'{"params":{},"params":{"name":"a"}}', True),
        (b'{"params":{"arguments":{"name":"a","name":"b"}}}', True),
        (b'{"params":{"name":"\\u003a\\u003A:"}}', False),
        (b'{"params":{"x":' + b"[" * 400 + b"]" * 400 + b"}}", False),
        (b'{"params":[],"id":1}', False),
        (b"{}", False),
    ],
)
def test_a_key_twice_is_seen_however_it_is_written(raw: bytes, ambiguous: bool):
    assert (bodies.read_message(raw) is None) is ambiguous


def test_a_name_that_stands_once_is_spliced_and_every_other_byte_is_kept():
    raw = b'{ "id":1.0e0, "method" :"tools/call","jsonrpc":"2.0","params":{"name" : "sb1_x" ,"arguments":{"n":1.50}}}'
    raw = raw.replace(b"1.0e0", b"1")
    assert renamed(raw) == raw.replace(b'"sb1_x"', b'"tool"')


@pytest.mark.parametrize(
    "params",
    [
        b'{"n\\u0061me":"sb1_x","arguments":{"name":"sb1_x"}}',
        b'{"name":"sb1_\\u0078","arguments":{"a":"sb1_x"}}',
        b'{"arguments":{"name":"sb1_x"},"name":"sb1_x"}',
        b'{"arguments":{"a":"\\"name\\": \\"sb1_x\\""},"name":"sb1_x"}',
        b'{"name":"sb1_\\u0078","arguments":{"name":"sb1_x"}}',
        b'{"name":"sb1_\\u0078","arguments":{},"x\\"name":"sb1_x"}',
    ],
)
def test_a_decoy_is_not_taken_for_the_name(params: bytes):
    raw = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":%b}' % params
    new, old = json.loads(renamed(raw)), json.loads(raw)
    assert new["params"] == {**old["params"], "name": "tool"}


@pytest.mark.parametrize(
    "number", ["18446744073709551616", "-99999999999999999999999", "1" * 300, "0.1000000000000000000001"]
)
def test_a_number_stays_as_it_stood(number: str):
    outer = {"session": "sb1", "tool": "add", "arguments": {"n": "NUMBER"}}
    raw = json.dumps(body("call", outer)).replace('"NUMBER"', number).encode()
    new = bodies.retarget(call(raw), "add")
    assert new is not None
    assert f'"n":{number}'.encode() in new


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'"x"',
        b"null",
        b"{",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b"[" * 9999,
        b'{"a":1,"a":1}',
        b'{"a":[{"b":":","b":":"}]}',
        b'{"a":1,"\\u0061":"\\u003A"}',
    ],
)
def test_what_is_not_one_strict_json_object_is_none(raw: bytes):
    assert bodies.read_message(raw) is None


@pytest.mark.parametrize(
    "change",
    [
        {"jsonrpc": "1.0"},
        {"method": "tools/list"},
        {"id": None},
        {"id": True},
        {"id": 1.5},
        {"id": []},
        {"params": None},
        {"params": []},
        {"params": {}},
        {"params": {"name": 1}},
        {"params": {"name": ""}},
        {"params": {"name": "sb1_x", "arguments": []}},
    ],
)
def test_what_is_not_a_well_formed_tool_call_is_none(change: dict[str, Any]):
    message = bodies.read_message(json.dumps({**body("sb1_x"), **change}).encode())
    assert message is not None
    assert bodies.as_tool_call(message) is None


def test_arguments_too_deep_to_write_anew_are_left_alone():
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    raw = json.dumps(body("call", {"session": "sb1", "tool": "add", "arguments": deep})).encode()
    assert bodies.retarget(call(raw), "add") is None


@pytest.mark.parametrize("value", [":", "\u003a\n", {"a": {"a": ":"}}, [{"a": 1}, {"a": 1}], '"a":1,"a":1', "\\u003a"])
def test_what_only_looks_like_a_key_that_comes_twice_is_read(value: Any):
    for raw in (json.dumps({"a": value}), json.dumps({"a": value, "b": "-"}, indent=1).replace("-", "\\u003a")):
        message = bodies.read_message(raw.encode())
        assert message is not None and message.fields["a"] == value
