"""Hosts that show a model the tools of their first `tools/list` for good, by their `clientInfo`, and what helps them.

Their models reach a sandbox's tools through `call` alone, so its description names those that there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from ash_hub.face.signatures import arguments_of, fit
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.spawning.toolsets import Toolset

__all__ = ["FIXED_LIST_HOSTS", "FixedListHost", "fixed_list_host", "note_of_tools"]

MAX_NOTE_CHARS: Final = 2000


@dataclass(frozen=True, slots=True)
class FixedListHost:
    """A host that does not follow changes of the list."""

    client: str
    """Pattern of `clientInfo.name`, in lower case; the version there is often not the host's own."""
    version: str
    """The host and its version that did so when it was last looked at."""
    reason: str


_IGNORES: Final = "lists when it connects, and ignores that the list changed"
FIXED_LIST_HOSTS: Final = (
    FixedListHost("codex-mcp-client*", "Codex CLI 0.171.0", "lists when it starts, and not in a later turn either"),
    FixedListHost("qwen-cli-mcp-client*", "Qwen Code 0.24.4", _IGNORES),
    FixedListHost("*cline*", "Cline CLI 3.0.65", _IGNORES),
    FixedListHost("continue-cli-client*", "Continue CLI 1.5.47", _IGNORES),
)


def fixed_list_host(client: str) -> FixedListHost | None:
    """Return the host that has this `clientInfo.name`, if it is one of these."""
    name = client[:128].lower()
    return next((host for host in FIXED_LIST_HOSTS if fnmatchcase(name, host.client)), None)


def note_of_tools(sandboxes: Iterable[Sandbox]) -> str:
    """Return what `call` can call now, as a part of its description; empty if there is no sandbox.

    Args:
        sandboxes: Ready ones; the last is named first.
    """
    sessions: dict[str, list[str]] = {}
    toolsets: dict[str, Toolset] = {}
    for sandbox in reversed(list(sandboxes)):
        if sandbox.toolset is not None:
            toolsets[sandbox.toolset.digest] = sandbox.toolset
            sessions.setdefault(sandbox.toolset.digest, []).append(sandbox.session)
    heads = {digest: f" Tools of {', '.join(names)}: " for digest, names in sessions.items()}
    whole = [heads[digest] + ", ".join(_called(toolsets[digest])) + "." for digest in heads]
    names = [heads[digest] + ", ".join(tool.name for tool in toolsets[digest].tools) + "." for digest in heads]
    return "".join(fit([whole, names], len, MAX_NOTE_CHARS)) or (names[0][: MAX_NOTE_CHARS - 1] + "…" if names else "")


def _called(toolset: Toolset) -> list[str]:
    return [f"{tool.name}({arguments_of(tool.input_schema)})" for tool in toolset.tools]
