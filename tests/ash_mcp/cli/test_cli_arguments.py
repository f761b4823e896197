"""Words of a command line become a tool's arguments, by the tool's own schema."""

from __future__ import annotations

from typing import Any, Final

import pytest
import typer

from ash_mcp.cli.arguments import check_required, read_arguments, read_json_arguments

SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["text"],
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "loud": {"type": "boolean"},
        "limit": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "either": {"type": ["string", "integer"]},
        "words": {"type": "array", "items": {"type": "string"}},
        "deep": {"$ref": "#/$defs/Deep"},
        "mode": {"enum": ["fast", "slow"]},
        "level": {"enum": [1, 2]},
        "any": {},
    },
    "$defs": {"Deep": {"type": "object"}},
}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("text=5", "5"),
        ("text=true", "true"),
        ("text=", ""),
        ("text=a=b", "a=b"),
        ("count=5", 5),
        ("count=5.0", 5),
        ("ratio=5", 5),
        ("ratio=0.5", 0.5),
        ("loud=true", True),
        ("loud=No", False),
        ("limit=null", None),
        ("limit=3", 3),
        ("either=3", 3),
        ("either=three", "three"),
        ('words=["a"]', ["a"]),
        ('deep={"a": 1}', {"a": 1}),
        ("mode=fast", "fast"),
        ("level=2", 2),
        ("any=3", 3),
        ("any=three", "three"),
        ("text:=5", 5),
        ('count:="5"', "5"),
    ],
)
def test_a_value_is_read_as_its_schema_says(word: str, value: Any) -> None:
    key = word.partition("=")[0].removesuffix(":")
    read = read_arguments([word], SCHEMA, "say")[key]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("text", "write key=value"),
        ("=x", "write key=value"),
        ("count=five", "not of type integer"),
        ("count=1.5", "not of type integer"),
        ("loud=1", "not of type boolean"),
        ("words=a,b", "write it as JSON"),
        ("deep=[1]", "write it as JSON"),
        ("any:=nope", "is not JSON"),
        ("ratio=.5e1", "not of type number"),
        ("ratio=NaN", "not of type number"),
        ("txet=a", "It takes: text="),
    ],
)
def test_a_word_that_does_not_fit_is_refused_and_says_what_does(word: str, says: str) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        read_arguments([word], SCHEMA, "say")


def test_an_argument_given_twice_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="twice"):
        read_arguments(["text=a", 'text:="b"'], SCHEMA, "say")


def test_what_the_schema_does_not_know_is_json_or_text() -> None:
    assert read_arguments(["a=1", "b=x", "c=[1]"], {}, "say") == {"a": 1, "b": "x", "c": [1]}


def test_a_reference_that_goes_in_circles_leaves_the_type_open() -> None:
    circular = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"$ref": "#/$defs/A"}}}
    assert read_arguments(["a=1"], circular, "say") == {"a": 1}


def test_missing_arguments_are_named() -> None:
    check_required({"text": "a"}, SCHEMA, "say")
    with pytest.raises(typer.BadParameter, match="say needs text=…"):
        check_required({}, SCHEMA, "say")


@pytest.mark.parametrize("text", ["", "[1]", "1", "{", '{"a": NaN}', "null"])
def test_json_arguments_are_one_object(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="arguments"):
        read_json_arguments(text)


def test_json_arguments_are_taken_as_they_are() -> None:
    assert read_json_arguments('{"count": "5"}') == {"count": "5"}
