"""Tool lists of sandboxes: read once, cleaned, pinned, and shown under a session's name.

What a server inside a sandbox says of itself is text from outside: it reaches a model's context, so it is bounded
and cleaned here before anyone sees it, and never asked for again.
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

from ash_mcp.types import SessionName
from ash_mcp.wire import ORIGINAL_NAME_META_KEY, RUNNER_TOOL_PREFIX

__all__ = ["Listing", "PinnedTool", "Toolset", "pin"]

MAX_TOOLS: Final = 256
MAX_DESCRIPTION_BYTES: Final = 4096
MAX_SCHEMA_BYTES: Final = 65_536
MAX_SCHEMA_DEPTH: Final = 20
_EMPTY_SCHEMA: Final[Mapping[str, Any]] = {"type": "object"}
_HINTS: Final = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")
_FOREIGN = re.compile(r"[^A-Za-z0-9_-]")
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

    def to_json(self, name: str | None = None) -> dict[str, Any]:
        """Return the tool as MCP lists it, under `name` or its own."""
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
    """A toolset as it appears under session names of one length."""

    tools: tuple[tuple[str, PinnedTool], ...]
    """Listed name without the session, and the tool."""
    renamed: Mapping[str, str]
    """Listed name -> own name, where they differ."""
    room: int
    """Characters that a name behind `<session>_` may have here; a toolset's listings differ by nothing else."""

    def under(self, session: SessionName) -> list[dict[str, Any]]:
        """Return the tools as `tools/list` shows them for one session."""
        return [tool.to_json(f"{session}_{name}") for name, tool in self.tools]


@dataclass(frozen=True, slots=True)
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


def pin(listed: Iterable[object], annotations: Mapping[str, Mapping[str, Any]]) -> Toolset:
    """Clean what a sandbox's server listed.

    Args:
        listed: The entries of its `tools/list`, unbelieved.
        annotations: The recipe's own word by tool name. A hint that the recipe does not give is not taken from the
            server when it would make a host less careful (`readOnlyHint` and `idempotentHint` become absent).
    """
    notes: list[str] = []
    tools: dict[str, PinnedTool] = {}
    for count, entry in enumerate(listed):
        if count >= MAX_TOOLS:
            notes.append(f"only the first {MAX_TOOLS} tools are shown")
            break
        tool = _clean(entry, annotations, notes)
        if tool is not None and tool.name not in tools:
            tools[tool.name] = tool
    kept = tuple(tools.values())
    body = json.dumps([tool.to_json() for tool in kept], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Toolset(hashlib.sha256(body.encode()).hexdigest(), kept, tuple(notes))


def _clean(entry: object, annotations: Mapping[str, Mapping[str, Any]], notes: list[str]) -> PinnedTool | None:
    fields = mapping(entry)
    name = fields.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 128 or not name.isprintable():
        notes.append("a tool without a usable name was left out")
        return None
    if name.startswith(RUNNER_TOOL_PREFIX):
        notes.append(f"tool {name} was left out: names that start with {RUNNER_TOOL_PREFIX} are the runner's")
        return None
    schema = _clean_schema(fields.get("inputSchema"))
    if schema is None:
        notes.append(f"the input schema of {name} was too large, too deep or not an object, and is not shown")
    title, description = fields.get("title"), fields.get("description")
    return PinnedTool(
        name=name,
        title=clean_text(title, 200) if isinstance(title, str) else None,
        description=clean_text(description, MAX_DESCRIPTION_BYTES) if isinstance(description, str) else "",
        input_schema=schema if schema is not None else _EMPTY_SCHEMA,
        output_schema=_clean_schema(fields.get("outputSchema")),
        annotations=_annotate(fields.get("annotations"), annotations.get(name, {})),
    )


def mapping(value: object) -> Mapping[str, Any]:
    """Return `value` if it is a JSON object, otherwise an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def clean_text(text: str, max_bytes: int) -> str:
    """Return `text` without control, bidirectional and tag characters, cut to `max_bytes` of UTF-8."""
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    raw = kept.encode()
    if len(raw) <= max_bytes:
        return kept
    return raw[: max_bytes - 3].decode(errors="ignore") + "…"


def _clean_schema(schema: object) -> Mapping[str, Any] | None:
    if not isinstance(schema, Mapping):
        return None
    try:
        cleaned = _clean_json(cast("Mapping[str, Any]", schema), MAX_SCHEMA_DEPTH)
    except ValueError:
        return None
    if not isinstance(cleaned, dict) or len(json.dumps(cleaned, separators=(",", ":"))) > MAX_SCHEMA_BYTES:
        return None
    shape = cast("dict[str, Any]", cleaned)
    return shape if _is_schema_of_object(shape) else None


def _is_schema_of_object(shape: Mapping[str, Any]) -> bool:
    """Say whether every protocol version can list it: one tool that one cannot would take the whole list with it."""
    required: Any = shape.get("required", [])
    return (
        shape.get("type") == "object"
        and isinstance(shape.get("properties", {}), dict)
        and isinstance(shape.get("$schema", ""), str)
        and isinstance(required, list)
        and all(isinstance(name, str) for name in cast("list[Any]", required))
    )


def _clean_json(value: Any, depth: int) -> Any:
    if depth < 0:
        raise ValueError("too deep")
    if isinstance(value, str):
        return clean_text(value, MAX_DESCRIPTION_BYTES)
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, item in cast("Mapping[str, Any]", value).items():
            if key in ("$ref", "$dynamicRef") and not (isinstance(item, str) and item.startswith("#")):
                raise ValueError("remote reference")
            out[clean_text(str(key), 256)] = _clean_json(item, depth - 1)
        return out
    if isinstance(value, list):
        return [_clean_json(item, depth - 1) for item in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a number of JSON")
    return value


def _annotate(said: object, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join hints: the recipe's word first, then only those of the server's that make a host more careful."""
    claimed = mapping(said)
    hints: dict[str, Any] = {}
    for hint in _HINTS:
        if isinstance(recipe.get(hint), bool):
            hints[hint] = recipe[hint]
        elif hint in ("destructiveHint", "openWorldHint") and claimed.get(hint) is True:
            hints[hint] = True
    return hints


def _fit(tools: Iterable[PinnedTool], room: int) -> Listing:
    fitted: dict[str, PinnedTool] = {}
    for tool in tools:
        name = _FOREIGN.sub("_", tool.name)
        if len(name) > room or name in fitted or name != tool.name:
            digest = hashlib.sha256(tool.name.encode()).hexdigest()[:_HASH_CHARS]
            name = f"{name[: room - _HASH_CHARS - 1]}-{digest}"
        fitted[name] = tool
    renamed = {name: tool.name for name, tool in fitted.items() if name != tool.name}
    return Listing(tuple(fitted.items()), renamed, room)
