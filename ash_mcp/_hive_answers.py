"""Parsers of the results of the hive's own tools into typed values. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ash_mcp._answers import call_result
from ash_mcp._protocol import as_object
from ash_mcp.errors import RemoteProtocolError
from ash_mcp.results import Share
from ash_mcp.types import RunInfo, SandboxInfo, ShareInfo, SnapshotInfo, Tool
from ash_mcp.wire import info_from_json, run_from_json, share_from_json, snapshot_from_json

__all__ = [
    "read_info",
    "read_infos",
    "read_names",
    "read_runs",
    "read_share",
    "read_shares",
    "read_snapshots",
    "read_tools",
    "structured",
]


def structured(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the structured content of a result of the hive.

    Raises:
        RemoteProtocolError: There is none, or an error without a type.
    """
    result = call_result(raw)
    shape = as_object(result.structured)
    if result.is_error or shape is None:
        raise RemoteProtocolError(f"the hive answered in an unknown way: {result.text[:500] or 'nothing'}")
    return shape


def read_info(shape: Mapping[str, Any]) -> SandboxInfo:
    return info_from_json(shape)


def read_infos(shape: Mapping[str, Any], name: str) -> list[SandboxInfo]:
    return [info_from_json(item) for item in _objects(shape, name)]


def read_runs(shape: Mapping[str, Any], name: str) -> list[RunInfo]:
    return [run_from_json(item) for item in _objects(shape, name)]


def read_names(shape: Mapping[str, Any], name: str) -> list[str]:
    return [str(item) for item in _items(shape, name)]


def read_shares(shape: Mapping[str, Any]) -> list[ShareInfo]:
    return [share_from_json(item) for item in _objects(shape, "shares")]


def read_snapshots(shape: Mapping[str, Any]) -> list[SnapshotInfo]:
    return [snapshot_from_json(item) for item in _objects(shape, "snapshots")]


def share_asked(
    *, tools: Sequence[str] | None = None, ports: Sequence[int] = (), ttl_seconds: float | None = None
) -> dict[str, Any]:
    """Return what the hive is asked for a share that `Sandbox.share` takes the same arguments of."""
    asked = {
        "tool_names": None if tools is None else list(tools),
        "ports": list(ports) or None,
        "ttl_seconds": ttl_seconds,
    }
    return {name: value for name, value in asked.items() if value is not None}


def read_share(shape: Mapping[str, Any]) -> Share:
    """Read a share that was just made."""
    shares, url, token = read_shares(shape), shape.get("url"), shape.get("token")
    if len(shares) != 1 or not isinstance(url, str) or not isinstance(token, str):
        raise RemoteProtocolError("the hive answered in an unknown way: it gave no token of a share")
    previews = {int(item["port"]): str(item["url"]) for item in _objects(shape, "previews")}
    return Share(info=shares[0], url=url, token=token, previews=previews)


def read_tools(shape: Mapping[str, Any]) -> list[Tool]:
    """Read a sandbox's tools, under its own names."""
    return [
        Tool(
            name=str(item.get("name", "")),
            description=str(item.get("description") or ""),
            input_schema=as_object(item.get("input_schema")) or {},
            output_schema=as_object(item.get("output_schema")),
            annotations=as_object(item.get("annotations")) or {},
            title=str(item["title"]) if item.get("title") is not None else None,
        )
        for item in _objects(shape, "tools")
    ]


def _items(shape: Mapping[str, Any], name: str) -> list[Any]:
    value = shape.get(name, [])
    if not isinstance(value, list):
        raise RemoteProtocolError(f"the hive answered in an unknown way: {name!r} is not a list")
    return cast("list[Any]", value)


def _objects(shape: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = [as_object(item) for item in _items(shape, name)]
    if any(item is None for item in found):
        raise RemoteProtocolError(f"the hive answered in an unknown way: {name!r} holds no objects")
    return [item for item in found if item is not None]
