"""What the hive's tools answer: the models behind their output schemas, and the text twin of each answer. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ash_hub.tools import PinnedTool, mapping

__all__ = [
    "Contents",
    "Destroyed",
    "SandboxList",
    "SandboxShape",
    "Spawned",
    "shown_tools",
    "text_of_tools",
    "tool_shape",
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SandboxShape(_Answer):
    """A sandbox as `ash_mcp.wire.info_to_json` writes it."""

    session: str
    sandbox_id: str
    scope: str
    recipe: str
    status: Annotated[str, Field(description="pending, starting, ready, stopping, gone or failed")]
    age_seconds: int
    created_at: str
    ready_at: str | None
    expires_at: str
    idle_seconds: float | None
    last_call_at: str | None
    ended_at: str | None
    reason: Annotated[str | None, Field(description="why it ended")]
    message: str | None
    labels: dict[str, str]
    warnings: list[str]


class ToolShape(_Answer):
    name: Annotated[str, Field(description="call it by this name, or by `tool` through call")]
    tool: str
    description: str
    input_schema: dict[str, Any]


class Spawned(SandboxShape):
    tools: list[ToolShape]


class Destroyed(_Answer):
    destroyed: list[SandboxShape]
    already_ended: list[SandboxShape]
    not_found: list[str]


class SandboxList(_Answer):
    sandboxes: list[SandboxShape]


class Contents(_Answer):
    contents: list[dict[str, Any]]


def shown_tools(session: str, listed: Iterable[tuple[str, PinnedTool]]) -> list[dict[str, Any]]:
    """Return a sandbox's tools as `spawn` answers them."""
    return [
        {
            "name": f"{session}_{name}",
            "tool": tool.name,
            "description": tool.description,
            "input_schema": dict(tool.input_schema),
        }
        for name, tool in listed
    ]


def tool_shape(tool: PinnedTool) -> dict[str, Any]:
    """Return all that is known of one tool, for the SDK."""
    return {
        "name": tool.name,
        "title": tool.title,
        "description": tool.description,
        "input_schema": dict(tool.input_schema),
        "output_schema": dict(tool.output_schema) if tool.output_schema is not None else None,
        "annotations": dict(tool.annotations),
    }


def text_of_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a tool: its name, its arguments and the first line of its description."""
    return "\n".join(
        f"- {tool['name']}({_signature(tool['input_schema'])}): {tool['description'].strip().partition(chr(10))[0]}"
        for tool in tools
    )


def _signature(schema: Mapping[str, Any]) -> str:
    required: set[str] = set(schema.get("required") or ())
    properties: Mapping[str, Any] = schema.get("properties") or {}
    parts = [f"{name}{'' if name in required else '?'}: {_type(shape)}" for name, shape in properties.items()]
    return ", ".join(parts)


def _type(value: object) -> str:
    shape = mapping(value)
    found = shape.get("type")
    names: list[str] = [found] if isinstance(found, str) else [_type(way) for way in shape.get("anyOf") or ()]
    return "|".join(name for name in names if name != "null") or "any"
