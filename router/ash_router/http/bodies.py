"""JSON-RPC messages: parses them, finds the tool that a request calls, and replaces the tool's name.

`rename` replaces the name in place and keeps every other byte. A message that another parser could read differently
(bad UTF-8, NaN, a repeated key) or not at all (deep nesting, a batch) is parsed as None, and reaches no sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, cast

import orjson

__all__ = [
    "HIVE_CALL",
    "Message",
    "ToolCall",
    "as_tool_call",
    "has_known_members",
    "read_message",
    "rename",
    "retarget",
]

HIVE_CALL: Final = "call"
"""The hive's own tool that names a session and a tool in its arguments."""

_MEMBERS: Final = frozenset({"jsonrpc", "id", "method", "params"})
_PARAMETERS: Final = frozenset({"name", "arguments", "_meta", "task", "inputResponses", "requestState"})

# orjson reads an integer beyond 64 bits as a float; every such number has a run of this many digits.
_LONG_NUMBER: Final = re.compile(rb"\d{19}")
# Escapes that give a character a second spelling; without them every string is spelled as orjson writes it.
_OTHER_SPELLING: Final = re.compile(rb"\\[u/]")
_SPACE: Final = re.compile(r"[ \t\n\r]*")
# Finds the end of a value. Numbers stay text: Python refuses to convert very long ones.
_scan: Final = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode

# A colon written as an escape, behind any number of escaped backslashes.
_ESCAPED_COLON: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u003[aA]")
_DEEP_BYTES: Final = 64 * 1024
"""The longest message that may be nested deeper than orjson writes: its check takes a hundred times as long."""

_SHORT: Final = 128
"""The longest tool name, in characters, whose pattern is cached."""

RequestId = str | int


@dataclass(slots=True)
class Message:
    """One JSON-RPC message that was POSTed."""

    raw: bytes
    """The body as sent."""
    fields: Mapping[str, Any]
    """The parsed object."""

    @property
    def method(self) -> str | None:
        method = self.fields.get("method")
        return method if isinstance(method, str) else None

    @property
    def params(self) -> Mapping[str, Any]:
        params = self.fields.get("params")
        return cast("Mapping[str, Any]", params) if isinstance(params, dict) else {}

    @property
    def progress_token(self) -> str | int | None:
        """The token with which a request asks for progress; None if it does not."""
        meta: Any = self.params.get("_meta")
        token: Any = cast("Mapping[str, Any]", meta).get("progressToken") if isinstance(meta, dict) else None
        return token if isinstance(token, str | int) and not isinstance(token, bool) else None


@dataclass(slots=True)
class ToolCall:
    """A well-formed `tools/call` request."""

    message: Message
    request_id: RequestId
    name: str
    arguments: Mapping[str, Any]


def read_message(raw: bytes) -> Message | None:
    """Return the message that `raw` consists of; None if it is not one JSON object, or ambiguous (see the module)."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, dict) or _repeats_a_key(raw, cast("Mapping[str, Any]", fields)):
        return None
    return Message(raw, cast("Mapping[str, Any]", fields))


def _repeats_a_key(raw: bytes, fields: Mapping[str, Any]) -> bool:
    """Return whether an object in `raw`, parsed as `fields`, repeats a key, or could."""
    written = _dump(fields)
    if written is not None:
        # the parser drops a repeated key with its value, and so with its colon
        has_escapes = b"\\" in raw and b"\\u003" in raw  # one byte is found much faster than several
        escaped = len(_ESCAPED_COLON.findall(raw)) if has_escapes else 0
        return written.count(b":") != raw.count(b":") + escaped
    if len(raw) > _DEEP_BYTES:
        return True
    try:
        json.loads(raw, object_pairs_hook=_once_each)
    except (ValueError, RecursionError):
        return True
    return False


def _once_each(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError


def as_tool_call(message: Message) -> ToolCall | None:
    """Return the tool call that `message` is; None if it is not a well-formed one."""
    fields = message.fields
    if fields.get("method") != "tools/call" or fields.get("jsonrpc") != "2.0":
        return None
    request_id: Any = fields.get("id")
    if type(request_id) is not str and type(request_id) is not int:  # a bool is an int to isinstance
        return None
    params = message.params
    name: Any = params.get("name")
    arguments: Any = params.get("arguments")
    if not isinstance(name, str) or not name or not (arguments is None or isinstance(arguments, dict)):
        return None
    return ToolCall(message, request_id, name, cast("Mapping[str, Any]", arguments or {}))


def has_known_members(call: ToolCall) -> bool:
    """Return whether a call has no members but those that MCP names.

    Some servers, such as those in Go, take `Name` for `name`: beside it, it would say another tool.
    """
    return call.message.fields.keys() <= _MEMBERS and call.message.params.keys() <= _PARAMETERS


def rename(call: ToolCall, name: str) -> bytes | None:
    """Return the body of `call` with another tool name, all other bytes unchanged; None if nested too deeply."""
    raw = call.message.raw
    spot = _spot_of(call.name) if len(call.name) <= _SHORT else _spot_of.__wrapped__(call.name)
    parts = spot.split(raw, 2)
    # without second spellings the name is spelled like this; found once, it is the one in `params`
    if len(parts) == 3 and (b"\\" not in raw or _OTHER_SPELLING.search(raw) is None):
        before, key, after = parts
        return b"".join((before, key, orjson.dumps(name), after))
    text = raw.decode()
    try:
        _, params, _ = _member(text, 0, "params")
        _, start, end = _member(text, params, "name")
    except RecursionError:
        return None
    return text[:start].encode() + orjson.dumps(name) + text[end:].encode()


def _member(text: str, at: int, key: str) -> tuple[str, int, int]:
    return next(member for member in _members(text, at) if member[0] == key)


def _members(text: str, at: int) -> list[tuple[str, int, int]]:
    """Return the key of each member of the valid JSON object at `at`, and where its value starts and ends.

    Raises:
        RecursionError: It is nested too deeply.
    """
    members: list[tuple[str, int, int]] = []
    at = _after_space(text, text.index("{", at) + 1)
    while text[at] != "}":
        key, at = _scan(text, at)
        start = _after_space(text, _after_space(text, at) + 1)
        _, end = _scan(text, start)
        members.append((key, start, end))
        at = _after_space(text, end)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return members


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


@lru_cache(1024)
def _spot_of(name: str) -> re.Pattern[bytes]:
    """Return the pattern that finds a tool's name in the body of a call; group 1 is its key."""
    return re.compile(rb'("name"\s*:\s*)' + re.escape(orjson.dumps(name)))


def retarget(call: ToolCall, name: str) -> bytes | None:
    """Return the body of the tool call that a call of the hive's `call` tool asks for, under the same request id.

    Args:
        name: The tool's name within its sandbox.

    Returns:
        None if the call is nested too deeply to be rewritten exactly.
    """
    fields = _exact_fields(call.message)
    if fields is None:
        return None
    params = dict(fields["params"])
    inner = params.pop("arguments").get("arguments")
    params["name"] = name
    if inner is not None:
        params["arguments"] = inner
    return _dump({**fields, "params": params})


def _exact_fields(message: Message) -> Mapping[str, Any] | None:
    if _LONG_NUMBER.search(message.raw) is None:
        return message.fields
    try:
        return json.loads(message.raw, parse_int=_keep, parse_float=_keep)
    except (ValueError, RecursionError):
        return None


def _keep(number: str) -> Any:
    return orjson.Fragment(number.encode())


def _dump(fields: Mapping[str, Any]) -> bytes | None:
    try:
        return orjson.dumps(fields)
    except TypeError:  # nested deeper than orjson writes
        return None
