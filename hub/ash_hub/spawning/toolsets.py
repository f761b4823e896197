"""Tool lists of sandboxes: read once, cleaned, pinned, and shown under a session's name.

A tool list is untrusted text that reaches a model's context. It is bounded and cleaned here before anyone sees it. The
sandbox is asked for its list once, at its start, so what the hive lists of it does not change afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from ash_hub.backends.documents import MAX_DOCUMENT_BYTES
from ash_hub.spawning.schema_references import inline_references
from ash_mcp.types import SessionName
from ash_mcp.wire import ORIGINAL_NAME_META_KEY, RUNNER_TOOL_PREFIX

__all__ = ["Listing", "PinnedTool", "Toolset", "clean_text", "digest_of", "mapping", "pin"]

MAX_TOOLS: Final = 256
MAX_DESCRIPTION_BYTES: Final = 4096
MAX_KEY_BYTES: Final = 256
"""Of a key of an object in a schema."""
MAX_SCHEMA_BYTES: Final = 65_536
MAX_SCHEMA_DEPTH: Final = 20
MAX_LIST_CHARACTERS: Final = 1024 * 1024
"""Of all texts of a list together, after each is cut to its own limit. MCP clients refuse larger events."""
MAX_LIST_BYTES: Final = MAX_DOCUMENT_BYTES - 1024
"""Of the tools of a list in the document that keeps the toolset; the rest of the document is less than 1 KiB."""
MAX_LIST_VALUES: Final = 65_536
"""JSON values in all schemas of a list together."""
_INVISIBLE: Final = ("Cc", "Cf", "Cs", "Co", "Cn")
"""Unicode categories of characters that are not shown."""
_EMPTY_SCHEMA: Final[Mapping[str, Any]] = {"type": "object"}
_HINTS: Final = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")
"""Characters that model APIs do not take in the name of a tool."""
_HASH_CHARS: Final = 8


@dataclass(frozen=True, slots=True)
class PinnedTool:
    """One tool of a sandbox, cleaned. `name` is the sandbox's own name for it."""

    name: str
    title: str | None
    description: str
    input_schema: Mapping[str, Any]
    output_schema: Mapping[str, Any] | None
    annotations: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """Return all that is known of the tool, as plain JSON; `PinnedTool(**fields)` is the tool again."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "input_schema": dict(self.input_schema),
            "output_schema": dict(self.output_schema) if self.output_schema is not None else None,
            "annotations": dict(self.annotations),
        }

    def kept_bytes(self) -> int:
        """Return how many bytes the tool takes in the document of its toolset."""
        return len(json.dumps(self.fields(), separators=(",", ":"), ensure_ascii=False).encode()) + 1

    def to_json(self, name: str | None = None) -> dict[str, Any]:
        """Return the tool as MCP lists it, under `name` or its own name, which `_meta` has where `name` hides it."""
        shape: dict[str, Any] = {"name": name or self.name, "description": self.description}
        if self.title:
            shape["title"] = self.title
        shape["inputSchema"] = self.input_schema
        if self.output_schema is not None:
            shape["outputSchema"] = self.output_schema
        if self.annotations:
            shape["annotations"] = self.annotations
        if name is not None and not name.endswith(f"_{self.name}"):
            shape["_meta"] = {ORIGINAL_NAME_META_KEY: self.name}
        return shape


@dataclass(frozen=True, slots=True)
class Listing:
    """A toolset with names that fit behind session names of one length."""

    tools: tuple[tuple[str, PinnedTool], ...]
    """Listed name without the session, and the tool."""
    renamed: Mapping[str, str]
    """Listed name -> own name, where they differ."""
    room: int
    """How many characters a name behind `<session>_` may have. Listings of a toolset with equal room are equal."""
    signatures: dict[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)
    """What tools take in one line each, by their own names; kept by whoever writes that."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Toolset:
    """The pinned tools of a sandbox. Equal toolsets have equal digests, and are kept once."""

    digest: str
    tools: tuple[PinnedTool, ...]
    notes: tuple[str, ...] = ()
    """What was changed or left out while cleaning, a sentence each."""
    _listings: dict[int, Listing] = field(default_factory=dict[int, Listing], compare=False, repr=False)

    def listing(self, session: SessionName, name_limit: int) -> Listing:
        """Return the toolset with names that fit `name_limit` characters behind `<session>_`."""
        room = max(_HASH_CHARS + 2, name_limit - len(session) - 1)
        known = self._listings.get(room)
        if known is None:
            known = self._listings[room] = _fit(self.tools, room)
        return known


class _ListTooLarge(Exception):
    """The `_Allowance` of a list is used up."""


@dataclass(slots=True)
class _Allowance:
    """How much of a list may still be processed. Lengths are taken from it before the texts are read."""

    characters: int = MAX_LIST_CHARACTERS
    values: int = MAX_LIST_VALUES
    bytes: int = MAX_LIST_BYTES

    def take(self, *, characters: int = 0, values: int = 0, bytes: int = 0) -> None:
        self.characters -= characters
        self.values -= values
        self.bytes -= bytes
        if min(self.characters, self.values, self.bytes) < 0:
            raise _ListTooLarge


def pin(listed: Iterable[object], annotations: Mapping[str, Mapping[str, Any]]) -> Toolset:
    """Clean what a sandbox's server listed. Its work is bounded, however large the list.

    Args:
        listed: The entries of its `tools/list`, untrusted.
        annotations: The recipe's annotations, by tool name. A hint that the recipe does not give is not taken from the
            server when it would make a host less careful (`readOnlyHint` and `idempotentHint` become absent).
    """
    notes: list[str] = []
    tools: dict[str, PinnedTool] = {}
    allowance = _Allowance()
    for count, entry in enumerate(listed):
        if count >= MAX_TOOLS:
            notes.append(f"only the first {MAX_TOOLS} tools are shown")
            break
        try:
            tool = _clean(entry, annotations, notes, allowance)
            if tool is not None and tool.name not in tools:
                allowance.take(bytes=tool.kept_bytes())
                tools[tool.name] = tool
        except _ListTooLarge:
            notes.append(f"only the first {count} tools are shown: the list is too large")
            break
    kept = tuple(tools.values())
    return Toolset(digest_of(kept), kept, tuple(notes))


def digest_of(tools: Iterable[PinnedTool]) -> str:
    """Return the hash of tools as MCP lists them, under their own names."""
    body = json.dumps([tool.to_json() for tool in tools], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def _clean(
    entry: object, annotations: Mapping[str, Mapping[str, Any]], notes: list[str], allowance: _Allowance
) -> PinnedTool | None:
    fields = mapping(entry)
    name = fields.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 128 or not name.isprintable():
        notes.append("a tool without a usable name was left out")
        return None
    if name.startswith(RUNNER_TOOL_PREFIX):
        notes.append(f"tool {name} was left out: names that start with {RUNNER_TOOL_PREFIX} are the runner's")
        return None
    schema = _clean_schema(fields.get("inputSchema"), allowance, inline=True)
    if schema is None:
        notes.append(f"the input schema of {name} was too large, too deep or not an object, and is not shown")
    return PinnedTool(
        name=name,
        title=_text(fields.get("title"), 200, allowance),
        description=_text(fields.get("description"), MAX_DESCRIPTION_BYTES, allowance) or "",
        input_schema=schema if schema is not None else _EMPTY_SCHEMA,
        output_schema=_clean_schema(fields.get("outputSchema"), allowance),
        annotations=_annotate(fields.get("annotations"), annotations.get(name, {})),
    )


def mapping(value: object) -> Mapping[str, Any]:
    """Return `value` if it is a JSON object, otherwise an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def clean_text(text: str, max_bytes: int) -> str:
    """Return `text` without control, bidirectional and tag characters, cut to `max_bytes` of UTF-8.

    It is cut first, so that a long text costs no more than one that just fits. What is removed from the part that is
    looked at makes no room for what comes behind it.
    """
    kept = text[:max_bytes]
    if not kept.isprintable():
        unseen = [c for c in set(kept) if c not in "\n\t" and unicodedata.category(c) in _INVISIBLE]
        kept = kept.translate(dict.fromkeys(map(ord, unseen)))
    raw = kept.encode()
    if len(text) <= max_bytes and len(raw) <= max_bytes:
        return kept
    return raw[: max_bytes - 3].decode(errors="ignore") + "…"


def _text(value: object, max_bytes: int, allowance: _Allowance) -> str | None:
    if not isinstance(value, str):
        return None
    allowance.take(characters=min(len(value), max_bytes))
    return clean_text(value, max_bytes)


def _clean_schema(schema: object, allowance: _Allowance, *, inline: bool = False) -> Mapping[str, Any] | None:
    if not isinstance(schema, Mapping):
        return None
    try:
        allowance.take(characters=_measure(cast("Mapping[str, Any]", schema), MAX_SCHEMA_DEPTH, allowance))
    except ValueError:
        return None
    cleaned = cast("dict[str, Any]", _clean_json(schema))
    if len(json.dumps(cleaned, separators=(",", ":"))) > MAX_SCHEMA_BYTES:
        return None
    if inline:
        cleaned = inline_references(cleaned, max_chars=MAX_SCHEMA_BYTES, max_depth=MAX_SCHEMA_DEPTH)
    return cleaned if _is_schema_of_object(cleaned) else None


def _is_schema_of_object(shape: Mapping[str, Any]) -> bool:
    """Return whether a schema is valid for a tool in every protocol version; one invalid tool fails a whole list."""
    required: Any = shape.get("required", [])
    return (
        shape.get("type") == "object"
        and isinstance(shape.get("properties", {}), dict)
        and isinstance(shape.get("$schema", ""), str)
        and isinstance(required, list)
        and all(isinstance(name, str) for name in cast("list[Any]", required))
    )


def _measure(value: Any, depth: int, allowance: _Allowance) -> int:
    """Return about how many characters a schema has as JSON, from lengths alone.

    Raises:
        ValueError: It cannot be shown: too large or too deep, no JSON, or with a `$ref` to outside the schema.
    """
    allowance.take(values=1)
    if depth < 0:
        raise ValueError("too deep")
    if isinstance(value, str):
        return min(len(value), MAX_DESCRIPTION_BYTES) + 2
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a number of JSON")
    if isinstance(value, int):
        return value.bit_length() // 4 + 1
    size = 2
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[str, Any]", value).items():
            if key in ("$ref", "$dynamicRef") and not (isinstance(item, str) and item.startswith("#")):
                raise ValueError("remote reference")
            size = _within(size + min(len(key), MAX_KEY_BYTES) + 4 + _measure(item, depth - 1, allowance))
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            size = _within(size + 1 + _measure(item, depth - 1, allowance))
    return size


def _within(size: int) -> int:
    if size > MAX_SCHEMA_BYTES:
        raise ValueError("too large")
    return size


def _clean_json(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value, MAX_DESCRIPTION_BYTES)
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {clean_text(key, MAX_KEY_BYTES): _clean_json(item) for key, item in items}
    if isinstance(value, list):
        return [_clean_json(item) for item in cast("list[Any]", value)]
    return value


def _annotate(listed: object, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join hints: the recipe's first, then only those of the server's that make a host more careful."""
    claimed = mapping(listed)
    hints: dict[str, Any] = {}
    for hint in _HINTS:
        if isinstance(recipe.get(hint), bool):
            hints[hint] = recipe[hint]
        elif hint in ("destructiveHint", "openWorldHint") and claimed.get(hint) is True:
            hints[hint] = True
    return hints


def _fit(tools: Iterable[PinnedTool], room: int) -> Listing:
    """Name the tools in at most `room` characters each; a name that had to change ends with a hash of the original."""
    fitted: dict[str, PinnedTool] = {}
    for tool in tools:
        name = _NOT_IN_NAMES.sub("_", tool.name)
        if len(name) > room or name in fitted or name != tool.name:
            digest = hashlib.sha256(tool.name.encode()).hexdigest()[:_HASH_CHARS]
            name = f"{name[: room - _HASH_CHARS - 1]}-{digest}"
        fitted[name] = tool
    renamed = {name: tool.name for name, tool in fitted.items() if name != tool.name}
    return Listing(tuple(fitted.items()), renamed, room)
