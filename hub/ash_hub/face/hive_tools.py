"""The hive's own tools as a host and a model see them: names, words, hints, schemas. No behaviour. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from ash_hub.face.arguments import (
    CallAsk,
    DestroyAsk,
    ExtendAsk,
    ListAsk,
    LogsAsk,
    NetworkAsk,
    ReadAsk,
    RunAsk,
    SpawnAsk,
    SpawnSomeAsk,
    ToolsAsk,
    with_sandbox,
)
from ash_hub.face.results import Contents, Destroyed, RunShape, SandboxList, SandboxShape, Spawned
from ash_hub.face.sharing import ShareAsk, Shared
from ash_hub.face.snapshots import ResetAsk, SnapshotAsk, Snapshotted
from ash_hub.face.transfers import Copied, CopyAsk, DownloadAsk, TicketUrl, UploadAsk
from ash_hub.spawning.schema_references import inline_references
from ash_hub.spawning.toolsets import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH

__all__ = ["HIVE_TOOLS", "INSTRUCTIONS", "UNLISTED_TOOLS", "HiveTool", "listed_hive_tools"]

INSTRUCTIONS: Final = (
    "Ash gives you isolated sandboxes: real Linux machines of your own where you may run anything. "
    "Call spawn to get one; it answers with a session name such as sb1, and the sandbox's tools then appear as "
    "sb1_<tool> (for example sb1_terminal-controller_execute_command). If your tool list does not show them, use "
    'call(session="sb1", tool="terminal-controller_execute_command", arguments={...}): it always works. '
    "Sandboxes are independent; spawn several for parallel work. Files and processes in a sandbox last until it is "
    "destroyed, expires (expires_at; use extend) or is idle too long; then spawn a new one. "
    "list shows yours and why any ended. destroy what you no longer need. Read a file by read_resource with "
    "sandbox://sb1/path. Nothing in a sandbox can reach the machine you run on."
)


@dataclass(frozen=True, slots=True)
class HiveTool:
    """One tool of the hive itself."""

    name: str
    title: str
    description: str
    ask: type[BaseModel]
    answer: type[BaseModel] | None
    """None: the answer is the sandbox's own, so no schema is declared (clients refuse what does not fit one)."""
    read_only: bool = False
    destructive: bool = False
    idempotent: bool = False
    open_world: bool = False

    def to_json(self, recipes: str = "") -> dict[str, Any]:
        """Return the tool as MCP lists it; `recipes` is a line on what can be spawned."""
        shape: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "description": self.description + (f" {recipes}" if issubclass(self.ask, SpawnAsk) and recipes else ""),
            "inputSchema": _schema(self.ask),
            "annotations": {
                "title": self.title,
                "readOnlyHint": self.read_only,
                "destructiveHint": self.destructive,
                "idempotentHint": self.idempotent,
                "openWorldHint": self.open_world,
            },
        }
        if self.answer is not None:
            shape["outputSchema"] = _schema(self.answer, answer=True)
        return shape


HIVE_TOOLS: Final = {
    tool.name: tool
    for tool in (
        HiveTool(
            "spawn",
            "Start a sandbox",
            "Start a new isolated sandbox and return its session name and its tools, which then appear beside this "
            "one as <session>_<tool>. Takes a few seconds. With count it starts that many alike.",
            SpawnSomeAsk,
            Spawned,
        ),
        HiveTool(
            "destroy",
            "End sandboxes",
            'End one sandbox, several, or all of yours (session="*") with everything in them; or a run with all of '
            "its own. Ending one that has ended already is not an error.",
            DestroyAsk,
            Destroyed,
            destructive=True,
            idempotent=True,
        ),
        HiveTool(
            "list",
            "List sandboxes",
            "Show your sandboxes: state, age, when they expire, and with include_ended=true why they ended. And your "
            "open runs.",
            ListAsk,
            SandboxList,
            read_only=True,
            idempotent=True,
        ),
        HiveTool(
            "extend",
            "Keep a sandbox longer",
            "Let a sandbox live ttl_seconds from now.",
            ExtendAsk,
            SandboxShape,
            idempotent=True,
        ),
        HiveTool(
            "network",
            "Change what a sandbox may reach",
            "Set the network of a sandbox that runs: none, internet, or a list of domains. Connections that the new "
            "policy refuses are closed. Narrow it when set-up is done; only its owner's key widens it again.",
            NetworkAsk,
            SandboxShape,
            destructive=True,
            idempotent=True,
        ),
        HiveTool(
            "run",
            "Open or renew a run",
            "Open a run: spawn(run=NAME) then makes sandboxes that it owns, and all end when it is destroyed or not "
            "renewed for lease_seconds. With renew=true the lease of the open run starts anew.",
            RunAsk,
            RunShape,
        ),
        HiveTool(
            "share",
            "Hand a sandbox to another agent",
            "Mint a token that opens one sandbox's tools, or only some, for another agent, and nothing else of yours: "
            "give it the url and the token. Also list a sandbox's shares, or revoke them.",
            ShareAsk,
            Shared,
            destructive=True,
        ),
        HiveTool(
            "upload_url",
            "Send a file into a sandbox",
            "Get a URL to which one request writes a file of a sandbox, of any size: for whoever has the bytes, or "
            "PUT to it with curl, so that they need not pass through you. A folder (path ends with /) takes a tar.",
            UploadAsk,
            TicketUrl,
        ),
        HiveTool(
            "download_url",
            "Get a file out of a sandbox",
            "Get a URL from which one request reads a file of a sandbox, of any size, with its size and media type: "
            "for whoever wants the bytes, without passing them through you. A folder (path ends with /) is a tar.",
            DownloadAsk,
            TicketUrl,
        ),
        HiveTool(
            "copy",
            "Copy files between sandboxes",
            "Copy a file of any size, or a folder (both paths end with /), from one of your sandboxes to another.",
            CopyAsk,
            Copied,
            destructive=True,
            idempotent=True,
        ),
        HiveTool(
            "snapshot",
            "Keep a sandbox's files",
            "Take a snapshot of a sandbox's files, to come back to (reset) or to start others from "
            "(spawn with snapshot). Its processes are ended, and it goes on from there. Also list your snapshots, or "
            "remove some.",
            SnapshotAsk,
            Snapshotted,
            destructive=True,
        ),
        HiveTool(
            "reset",
            "Take a sandbox back to a snapshot",
            "End what runs in a sandbox and give it the files of a snapshot again. Its name and tools stay.",
            ResetAsk,
            SandboxShape,
            destructive=True,
            idempotent=True,
        ),
        HiveTool(
            "call",
            "Call a sandbox's tool",
            "Call a tool of one of your sandboxes. The same as calling <session>_<tool>; use it when your tool list "
            "does not show that name. The answer is the tool's own.",
            CallAsk,
            None,
            destructive=True,
            open_world=True,
        ),
        HiveTool(
            "read_resource",
            "Read a file or resource of a sandbox",
            "Read a file of a sandbox (sandbox://<session>/<path>) or a resource that one of its tools linked to.",
            ReadAsk,
            Contents,
            read_only=True,
            idempotent=True,
        ),
    )
}

UNLISTED_TOOLS: Final = {
    "ash_tools": HiveTool("ash_tools", "", "", ToolsAsk, None, read_only=True),
    "ash_logs": HiveTool("ash_logs", "", "", LogsAsk, None, read_only=True),
}
"""For the SDK: a sandbox's whole tool list, and the log of its main process."""


def listed_hive_tools(recipes: str) -> list[dict[str, Any]]:
    return [tool.to_json(recipes) for tool in HIVE_TOOLS.values()]


class _Compact(GenerateJsonSchema):
    """Drops the titles that pydantic makes of field names: they cost tokens and say nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        shape = super().default_schema(schema)
        if shape.get("default", 0) is None or shape.get("default", 0) in ({}, [], ""):
            shape.pop("default", None)
        return shape


@cache
def _schema(model: type[BaseModel], *, answer: bool = False) -> dict[str, Any]:
    mode = "serialization" if answer else "validation"
    schema = _strip(model.model_json_schema(schema_generator=_Compact, mode=mode))
    if answer:
        return schema
    return with_sandbox(inline_references(schema, max_chars=MAX_SCHEMA_BYTES, max_depth=MAX_SCHEMA_DEPTH))


def _strip(schema: dict[str, Any]) -> dict[str, Any]:
    """Drop model titles and docstrings below the top, which are for readers of the code."""
    schema.pop("title", None)
    schema.pop("description", None)
    for definition in schema.get("$defs", {}).values():
        definition.pop("title", None)
        definition.pop("description", None)
    return schema
