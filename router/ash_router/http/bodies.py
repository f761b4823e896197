"""JSON bodies: reading which tool a request calls, and rewriting its name without touching the rest.

A body is spliced where the name stands once; otherwise it is written anew from what was read, with every number kept
as it stood. What cannot be read strictly (bad UTF-8, NaN, deep nesting, a batch) is None: somebody else answers it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, cast

import orjson

__all__ = ["HIVE_CALL", "Message", "ToolCall", "as_tool_call", "read_message", "rename", "retarget"]

HIVE_CALL: Final = "call"
"""The hive's own tool that names a session and a tool in its arguments."""

# orjson reads an integer beyond 64 bits as a float; every such number has a run of this many digits.
_LONG_NUMBER: Final = re.compile(rb"\d{19}")
# "name" written with escapes. No encoder does it; a body that does is written anew instead of spliced.
_ESCAPED_KEY: Final = re.compile(rb"\\u00(?:6[1dDeE5])")

_SHORT: Final = 128
"""Names up to here are worth being remembered."""

RequestId = str | int


@dataclass(slots=True)
class Message:
    """One JSON-RPC message that was POSTed."""

    raw: bytes
    fields: Mapping[str, Any]

    @property
    def method(self) -> str | None:
        method = self.fields.get("method")
        return method if isinstance(method, str) else None

    @property
    def params(self) -> Mapping[str, Any]:
        params = self.fields.get("params")
        return cast("Mapping[str, Any]", params) if isinstance(params, dict) else {}


@dataclass(slots=True)
class ToolCall:
    """A well-formed `tools/call` request."""

    message: Message
    request_id: RequestId
    name: str
    arguments: Mapping[str, Any]


def read_message(raw: bytes) -> Message | None:
    """Return the one JSON object in `raw`, or None."""
    try:
        fields = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return Message(raw, cast("Mapping[str, Any]", fields)) if isinstance(fields, dict) else None


def as_tool_call(message: Message) -> ToolCall | None:
    """Return `message` as a tool call if it is a well-formed one."""
    fields = message.fields
    if fields.get("method") != "tools/call" or fields.get("jsonrpc") != "2.0":
        return None
    request_id: Any = fields.get("id")
    if not isinstance(request_id, str | int) or isinstance(request_id, bool):
        return None
    params = message.params
    name: Any = params.get("name")
    arguments: Any = params.get("arguments")
    if not isinstance(name, str) or not name or not (arguments is None or isinstance(arguments, dict)):
        return None
    return ToolCall(message, request_id, name, cast("Mapping[str, Any]", arguments or {}))


def rename(call: ToolCall, name: str) -> bytes | None:
    """Return the call's body with another tool name, or None if it cannot be kept exact."""
    raw = call.message.raw
    spot = _spot_of(call.name) if len(call.name) <= _SHORT else _spot_of.__wrapped__(call.name)
    found = spot.search(raw)
    if found is not None and spot.search(raw, found.end()) is None and _ESCAPED_KEY.search(raw) is None:
        return raw[: found.start(1)] + orjson.dumps(name) + raw[found.end(1) :]
    fields = _exact_fields(call.message)
    return None if fields is None else _dump({**fields, "params": {**fields["params"], "name": name}})


@lru_cache(1024)
def _spot_of(name: str) -> re.Pattern[bytes]:
    """Return what finds a tool's name in the body of a call of it."""
    return re.compile(rb'"name"\s*:\s*(' + re.escape(orjson.dumps(name)) + rb")")


def retarget(call: ToolCall, name: str) -> bytes | None:
    """Return the body of the call that the hive's `call` tool asks for: its inner tool and arguments, the same id.

    None if it cannot be kept exact.
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
