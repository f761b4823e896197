"""Results of the hive's tools: the models behind their output schemas, and the texts of the longer ones. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import shorten
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from ash_hub.face.answer import Answer
from ash_hub.face.signatures import arguments_of, first_line, fit
from ash_hub.spawning.toolsets import Listing, PinnedTool
from ash_mcp.wire import network_text

__all__ = [
    "Contents",
    "Destroyed",
    "RunShape",
    "SandboxList",
    "SandboxShape",
    "Spawned",
    "spawned",
    "spawned_several",
    "text_of_tools",
]

MAX_SPAWNED_CHARS: Final = 3900
"""Of the text and of the structured content each: hosts cut what is longer than about 4,000."""
MAX_WARNINGS_CHARS: Final = 800
MAX_NETWORK_CHARS: Final = 300
MAX_SESSIONS_CHARS: Final = 1500
MAX_SESSIONS_IN_WORDS: Final = 60
MAX_FAILED_KINDS: Final = 2
_MORE: Final = "- and {} more; see tools/list"


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
    cause: Annotated[str | None, Field(description="who caused its end: agent, limit, hive, host or operator")]
    message: str | None
    labels: dict[str, str]
    network: Annotated[str | list[str], Field(description="what it may reach: none, internet, or domains")]
    warnings: list[str]
    run: Annotated[str | None, Field(description="the run that owns it")]
    ports: Annotated[list[int], Field(description="ports inside it that can be reached through the hive")]


class RunShape(_Answer):
    """An open run as `ash_mcp.wire.run_to_json` writes it."""

    run: str
    run_id: str
    scope: str
    lease_seconds: float
    left_seconds: Annotated[float, Field(description="until it ends unless it is renewed")]
    opened_at: str


class FailedShape(_Answer):
    """Spawns of several that failed alike."""

    count: int
    kind: str
    message: str
    retryable: bool


class ToolShape(_Answer):
    name: str
    arguments: Annotated[str | None, Field(description="what it takes; absent where there are many tools")] = None
    tool: Annotated[str | None, Field(description="its name for call, if not that behind <session>_")] = None


class Spawned(SandboxShape):
    how_to_call: str
    share: Annotated[
        dict[str, Any] | None, Field(description="the share that was asked for: what the tool share answers")
    ] = None
    tools: list[ToolShape]
    more_tools: Annotated[int, Field(description="how many it has that are not in tools")]
    sessions: Annotated[list[str] | None, Field(description="with count: the sessions of all that are ready")] = None
    more_sessions: Annotated[int | None, Field(description="how many there are beyond sessions; list shows them")] = (
        None
    )
    failed: Annotated[list[FailedShape] | None, Field(description="with count: what became of the others")] = None


class Destroyed(_Answer):
    destroyed: list[SandboxShape]
    already_ended: list[SandboxShape]
    not_found: list[str]
    run: Annotated[str | None, Field(description="the run that was ended")] = None


class SandboxList(_Answer):
    sandboxes: list[SandboxShape]
    runs: Annotated[list[RunShape], Field(description="your open runs")]


class Contents(_Answer):
    contents: list[dict[str, Any]]


def spawned(
    shape: Mapping[str, Any],
    session: str,
    listing: Listing,
    several: Mapping[str, Any] = MappingProxyType({}),
    share: Answer | None = None,
) -> tuple[dict[str, Any], str]:
    """Return what `spawn` answers, as JSON and as text, each of at most `MAX_SPAWNED_CHARS` beside the labels.

    Args:
        shape: The sandbox, as `SandboxShape`.
        several: What more is said of a spawn of several, whose first this is: see `spawned_several`.
        share: What the tool `share` answered, where the spawn asked for one.
    """
    words = f"Sandbox {session} is ready ({shape['recipe']}, {shape['sandbox_id']}), until {shape['expires_at']}."
    if several:
        words = _several_in_words(several) + f" The first: {words}"
    words += f" Its network: {shorten(network_text(shape['network']), MAX_NETWORK_CHARS, placeholder=' …')}."
    how = _how_to_call(session, listing)
    warnings = _some_warnings(shape["warnings"])
    shared = {"share": share.structured} if share is not None else {}
    begun = {**shape, "warnings": warnings, "how_to_call": how, **shared, "tools": [], "more_tools": 0, **several}
    tools = fit(_shapes(session, listing), _chars_of_shape, MAX_SPAWNED_CHARS - len(json.dumps(begun, indent=2)))
    begun |= {"tools": tools, "more_tools": len(listing.tools) - len(tools)}
    notes = [f"Note: {warning}" for warning in warnings] + ([share.text] if share is not None else [])
    above = "\n".join((words, *notes, how, "Its tools:\n"))
    lines = fit(_lines(session, listing), _chars_of_line, MAX_SPAWNED_CHARS - len(above) - len(_MORE))
    more = len(listing.tools) - len(lines)
    return begun, above + "\n".join([*lines, *([_MORE.format(more)] if more else [])])


def spawned_several(sessions: Sequence[str], failures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the answer to a spawn of several says beside its first sandbox.

    Args:
        failures: Of each that was not made, as `failure_to_json` has it.
    """
    alike = Counter((str(it["kind"]), shorten(str(it["message"]), 300), bool(it["retryable"])) for it in failures)
    failed = [
        {"count": count, "kind": kind, "message": message, "retryable": retryable}
        for (kind, message, retryable), count in alike.most_common(MAX_FAILED_KINDS)
    ]
    shown = list(fit([list(sessions)], lambda session: len(session) + 8, MAX_SESSIONS_CHARS))
    return {"sessions": shown, "more_sessions": len(sessions) - len(shown), "failed": failed}


def _several_in_words(several: Mapping[str, Any]) -> str:
    ready = len(several["sessions"]) + several["more_sessions"]
    names = ", ".join(several["sessions"][:MAX_SESSIONS_IN_WORDS])
    more = ready - min(len(several["sessions"]), MAX_SESSIONS_IN_WORDS)
    words = f"{ready} sandboxes are ready, all alike: {names}{f' and {more} more (list shows them)' if more else ''}."
    return words + "".join(f" {it['count']} failed ({it['kind']}): {it['message']}" for it in several["failed"])


def text_of_tools(session: str, listing: Listing) -> str:
    """Return one line a tool: its name, its arguments and the first line of its description."""
    return "\n".join(_lines(session, listing)[0])


def _how_to_call(session: str, listing: Listing) -> str:
    tool = listing.tools[0][1].name if listing.tools else "TOOL"
    return (
        f'If your tool list does not show its tools: call(session="{session}", tool="{tool}", arguments={{...}}), '
        f'where tool is the name without "{session}_".'
    )


def _some_warnings(warnings: Sequence[str]) -> list[str]:
    kept = list(fit([warnings], lambda warning: len(json.dumps(warning)) + 6, MAX_WARNINGS_CHARS))
    more = len(warnings) - len(kept)
    return [*kept, f"and {more} more; list shows them"] if more else kept


def _shapes(session: str, listing: Listing) -> list[list[dict[str, Any]]]:
    """Return a sandbox's tools as JSON, with their arguments and without."""
    names: list[dict[str, Any]] = []
    for name, tool in listing.tools:
        names.append({"name": f"{session}_{name}", **({"tool": tool.name} if tool.name != name else {})})
    whole = [
        {**shape, "arguments": _arguments_of(tool, listing)}
        for shape, (_, tool) in zip(names, listing.tools, strict=True)
    ]
    return [whole, names]


def _arguments_of(tool: PinnedTool, listing: Listing) -> str:
    known = listing.signatures.get(tool.name)
    if known is None:
        known = listing.signatures[tool.name] = arguments_of(tool.input_schema)
    return known


def _lines(session: str, listing: Listing) -> list[list[str]]:
    """Return a sandbox's tools as text: with descriptions, with arguments, by name alone."""
    names: list[str] = []
    called: list[str] = []
    described: list[str] = []
    for name, tool in listing.tools:
        own = f" [tool={tool.name}]" if tool.name != name else ""
        line = f"- {session}_{name}({_arguments_of(tool, listing)}){own}"
        said = first_line(tool.description)
        names.append(f"- {session}_{name}{own}")
        called.append(line)
        described.append(f"{line}: {said}" if said else line)
    return [described, called, names]


def _chars_of_shape(shape: Mapping[str, Any]) -> int:
    # As `indent=2` writes it, which is ten times as slow: two more for each line.
    return len(json.dumps(shape)) + 2 * (len(shape) + 1) + 4 * (len(shape) + 2) + 2


def _chars_of_line(line: str) -> int:
    return len(line) + 1
