"""The wire format: header names, paths, JSON shapes and the table of error codes. Pure.

`failure_to_json` and `failure_from_json` are each other's inverse; so are `info_to_json` and `info_from_json`,
`share_to_json` and `share_from_json`, and `snapshot_to_json` and `snapshot_from_json`.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

from ash_mcp import errors
from ash_mcp.errors import AshError
from ash_mcp.types import (
    Cause,
    EndReason,
    RunId,
    RunInfo,
    SandboxId,
    SandboxInfo,
    Scope,
    SessionName,
    ShareInfo,
    SnapshotId,
    SnapshotInfo,
    State,
)

__all__ = [
    "CLAIM_PATH",
    "FAILURE_META_KEY",
    "FILES_PATH",
    "HEADER_NONCE",
    "HEADER_ORIGIN",
    "HEADER_SCOPE",
    "HEADER_SEED_ROUTER",
    "HEADER_TOKEN",
    "HEALTH_PATH",
    "MCP_PATH",
    "MODERN_VERSION",
    "ORIGINAL_NAME_META_KEY",
    "ORIGIN_HUB",
    "ORIGIN_SANDBOX",
    "PORTS_PATH",
    "PROOF_PATH",
    "RUNNER_TOOL_PREFIX",
    "TERMINAL_PATH",
    "failure_from_json",
    "failure_to_json",
    "file_query",
    "file_target",
    "http_status",
    "info_from_json",
    "info_to_json",
    "jsonrpc_code",
    "network_text",
    "run_from_json",
    "run_to_json",
    "share_from_json",
    "share_to_json",
    "snapshot_from_json",
    "snapshot_to_json",
    "tool_failure",
]

MCP_PATH = "/mcp"
"""The hive's endpoint; `/mcp/in/<scope>` is the same, narrowed."""

MODERN_VERSION = "2026-07-28"
"""The stateless protocol revision that the SDK and the hub itself speak."""

HEADER_SCOPE = "ash-scope"
HEADER_ORIGIN = "ash-origin"
"""On every response of the hive: who made its body, `hub` or `sandbox`. Dropped from what a sandbox sends."""
HEADER_NONCE = "ash-nonce"
"""On a relayed response: what a failure that the hub appends to the begun stream repeats in its `_meta`."""
HEADER_SEED_ROUTER = "ash-seed-router"
"""On requests of a router for the seed's routes. A hive refuses them: they are meant for servers that are not ours."""
HEADER_TOKEN = "ash-token"
"""From hub to sandbox: the call token."""

ORIGIN_HUB = "hub"
ORIGIN_SANDBOX = "sandbox"

FAILURE_META_KEY = "ash/failure"
"""The `_meta` key of a tool result that carries a typed failure of the hive."""

ORIGINAL_NAME_META_KEY = "ash/tool"
"""The `_meta` key of a listed tool that holds the sandbox's own name for it."""

RUNNER_TOOL_PREFIX = "ash_"
"""Tools of the runner itself (exec, jobs, files) start so; they are callable on every sandbox and never listed."""

HEALTH_PATH = "/_ash/health"
CLAIM_PATH = "/_ash/claim"
FILES_PATH = "/_ash/files"
PORTS_PATH = "/_ash/ports"
PROOF_PATH = "/_ash/proof"
TERMINAL_PATH = "/_ash/terminal"


def file_query(path: str) -> str:
    """Return the target by which a runner is asked for a file or folder, whatever its path."""
    return f"{FILES_PATH}?path={quote(path, safe='', errors='surrogateescape')}"


def file_target(sandbox: SandboxId, path: str) -> str:
    """Return the target of a file or folder at a hive's door: in its plain form where the path has one."""
    names = path.removesuffix("/").split("/")
    door = f"/s/{sandbox}/files"
    if path not in ("", "/") and not {"", ".", ".."} & set(names):
        below = "/".join(quote(name, safe="", errors="surrogateescape") for name in names)
        return f"{door}/{below}{'/' if path.endswith('/') else ''}"
    return f"{door}/" if path in (".", "./") else door + file_query(path).removeprefix(FILES_PATH)


def _classes(base: type[AshError]) -> Iterator[type[AshError]]:
    yield base
    for child in base.__subclasses__():
        yield from _classes(child)


_BY_KIND: Mapping[str, type[AshError]] = {cls.kind: cls for cls in _classes(AshError)}

# kind -> (HTTP status, JSON-RPC code). MCP itself uses -32020 to -32042 of the server range; ours start at -32060.
# A kind that is not here takes its nearest ancestor's row.
_CODES: Mapping[str, tuple[int, int]] = {
    "ash_error": (500, -32603),
    "bad_request": (400, -32602),
    "refused": (403, -32061),
    "not_found": (404, -32062),
    "conflict": (409, -32063),
    "capacity_exceeded": (429, -32064),
    "permission_denied": (403, -32065),
    "unauthenticated": (401, -32066),
    "unsupported": (501, -32067),
    "sandbox_error": (502, -32068),
    "run_ended": (410, -32076),
    "sandbox_gone": (410, -32069),
    "sandbox_reset": (409, -32077),
    "sandbox_refused": (422, -32075),
    "command_failed": (422, -32070),
    "transport_error": (502, -32071),
    "connect_failed": (502, -32071),
    "timeout": (504, -32072),
    "stream_broken": (502, -32073),
    "protocol_error": (502, -32074),
    "hive_fault": (500, -32603),
}


def _codes(kind: str) -> tuple[int, int]:
    for cls in _BY_KIND.get(kind, AshError).__mro__:
        row = _CODES.get(getattr(cls, "kind", ""))
        if row is not None:
            return row
    return _CODES["ash_error"]


def http_status(error: AshError) -> int:
    """Return the HTTP status that goes with `error`."""
    return _codes(error.kind)[0]


def jsonrpc_code(error: AshError) -> int:
    """Return the JSON-RPC error code that goes with `error`."""
    return _codes(error.kind)[1]


def failure_to_json(error: AshError) -> dict[str, Any]:
    """Return `{"kind", "message", "retryable", "trainable", "data"?}`."""
    shape: dict[str, Any] = {
        "kind": error.kind,
        "message": error.message,
        "retryable": error.retryable,
        "trainable": error.trainable,
    }
    if error.data:
        shape["data"] = dict(error.data)
    return shape


def failure_from_json(shape: Any) -> AshError:
    """Rebuild a failure; an unknown kind becomes a plain `AshError` with the same message.

    Whether it is trainable follows from its kind, whatever `shape` says.
    """
    if not isinstance(shape, Mapping):
        return errors.RemoteProtocolError("the hive's failure is not a JSON object")
    fields = cast("Mapping[str, Any]", shape)
    cls = _BY_KIND.get(str(fields.get("kind")), AshError)
    raw = fields.get("data")
    data = {str(k): v for k, v in cast("Mapping[str, Any]", raw).items()} if isinstance(raw, Mapping) else {}
    for taken in ("message", "retryable", "trainable", "result", "self"):
        data.pop(taken, None)
    return cls(
        str(fields.get("message", "")),
        retryable=fields.get("retryable") is True,
        **data,
    )


def tool_failure(error: AshError, *, nonce: str | None = None) -> dict[str, Any]:
    """Return `error` as an MCP tool result that a model can read and a program can trust."""
    meta: dict[str, Any] = {FAILURE_META_KEY: failure_to_json(error)}
    if nonce is not None:
        meta[HEADER_NONCE] = nonce
    return {"content": [{"type": "text", "text": error.message}], "isError": True, "_meta": meta}


def _stamp(at: float | None) -> str | None:
    if at is None:
        return None
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _unstamp(text: Any) -> float | None:
    return datetime.datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None


def info_to_json(info: SandboxInfo, *, now: float) -> dict[str, Any]:
    """Return a sandbox as `spawn` and `list` show it; times are ISO 8601 in UTC, `now` gives its age."""
    return {
        "session": info.session,
        "sandbox_id": info.id,
        "scope": info.scope,
        "recipe": info.recipe,
        "status": info.state.value,
        "age_seconds": max(0, math.floor((info.ended_at or now) - info.created_at)),
        "created_at": _stamp(info.created_at),
        "ready_at": _stamp(info.ready_at),
        "expires_at": _stamp(info.expires_at),
        "idle_seconds": info.idle_seconds,
        "last_call_at": _stamp(info.last_call_at),
        "ended_at": _stamp(info.ended_at),
        "reason": info.reason.value if info.reason is not None else None,
        "cause": info.cause.value if info.cause is not None else None,
        "message": info.message,
        "labels": dict(info.labels),
        "network": info.network if isinstance(info.network, str) else list(info.network),
        "warnings": list(info.warnings),
        "run": info.run,
        "ports": list(info.ports),
    }


def run_to_json(info: RunInfo) -> dict[str, Any]:
    """Return a run as `run` and `list` show it."""
    return {
        "run": info.name,
        "run_id": info.id,
        "scope": info.scope,
        "lease_seconds": info.lease_seconds,
        "left_seconds": round(info.left_seconds, 3),
        "opened_at": _stamp(info.opened_at),
    }


def run_from_json(shape: Mapping[str, Any]) -> RunInfo:
    """Rebuild what `run_to_json` wrote.

    Raises:
        RemoteProtocolError: A field is missing or has another type.
    """
    try:
        return RunInfo(
            id=RunId(str(shape["run_id"])),
            name=str(shape["run"]),
            scope=Scope(str(shape.get("scope", ""))),
            lease_seconds=float(shape["lease_seconds"]),
            left_seconds=float(shape["left_seconds"]),
            opened_at=_unstamp(shape["opened_at"]) or 0.0,
        )
    except (KeyError, ValueError, TypeError) as exc:
        raise errors.RemoteProtocolError(f"the hive described a run in an unknown way: {exc!r}") from exc


def network_text(network: str | Sequence[str]) -> str:
    """Return a network policy as people read it: its word, or its entries with commas."""
    return network if isinstance(network, str) else ", ".join(network) or "none"


def _read_network(found: Any) -> str | tuple[str, ...]:
    return found if isinstance(found, str) else tuple(str(entry) for entry in found)


def info_from_json(shape: Mapping[str, Any]) -> SandboxInfo:
    """Rebuild what `info_to_json` wrote.

    Raises:
        RemoteProtocolError: A field is missing or has another type.
    """
    try:
        reason, cause = shape.get("reason"), shape.get("cause")
        return SandboxInfo(
            id=SandboxId(str(shape["sandbox_id"])),
            session=SessionName(str(shape["session"])),
            scope=Scope(str(shape.get("scope", ""))),
            recipe=str(shape["recipe"]),
            state=State(shape["status"]),
            created_at=_unstamp(shape["created_at"]) or 0.0,
            ready_at=_unstamp(shape.get("ready_at")),
            expires_at=_unstamp(shape["expires_at"]) or 0.0,
            idle_seconds=shape.get("idle_seconds"),
            last_call_at=_unstamp(shape.get("last_call_at")),
            ended_at=_unstamp(shape.get("ended_at")),
            reason=EndReason(reason) if reason is not None else None,
            cause=Cause(cause) if cause is not None else None,
            message=shape.get("message"),
            labels=dict(shape.get("labels") or {}),
            network=_read_network(shape.get("network", "none")),
            warnings=tuple(shape.get("warnings") or ()),
            run=shape.get("run"),
            ports=tuple(int(port) for port in shape.get("ports") or ()),
        )
    except (KeyError, ValueError, TypeError) as exc:
        raise errors.RemoteProtocolError(f"the hive described a sandbox in an unknown way: {exc!r}") from exc


def snapshot_to_json(info: SnapshotInfo) -> dict[str, Any]:
    """Return a snapshot as the tool `snapshot` shows it."""
    return {
        "snapshot_id": info.id,
        "session": info.session,
        "sandbox_id": info.sandbox_id,
        "scope": info.scope,
        "recipe": info.recipe,
        "bytes": info.size,
        "created_at": _stamp(info.created_at),
        "expires_at": _stamp(info.expires_at),
        "run": info.run,
    }


def snapshot_from_json(shape: Mapping[str, Any]) -> SnapshotInfo:
    """Read what `snapshot_to_json` wrote.

    Raises:
        RemoteProtocolError: It is something else.
    """
    try:
        return SnapshotInfo(
            id=SnapshotId(str(shape["snapshot_id"])),
            session=SessionName(str(shape["session"])),
            sandbox_id=SandboxId(str(shape["sandbox_id"])),
            scope=Scope(str(shape.get("scope", ""))),
            recipe=str(shape["recipe"]),
            size=int(shape["bytes"]),
            created_at=_unstamp(shape["created_at"]) or 0.0,
            expires_at=_unstamp(shape["expires_at"]) or 0.0,
            run=str(shape["run"]) if shape.get("run") is not None else None,
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise errors.RemoteProtocolError(f"the hive described a snapshot in an unknown way: {exc!r}") from exc


def share_to_json(share: ShareInfo) -> dict[str, Any]:
    return {
        "share_id": share.id,
        "tool_names": list(share.tools),
        "ports": list(share.ports),
        "created_at": _stamp(share.created_at),
        "expires_at": _stamp(share.expires_at),
    }


def share_from_json(shape: Mapping[str, Any]) -> ShareInfo:
    """Read what `share_to_json` wrote.

    Raises:
        RemoteProtocolError: It is something else.
    """
    try:
        return ShareInfo(
            id=str(shape["share_id"]),
            tools=tuple(str(tool) for tool in shape["tool_names"]),
            ports=tuple(int(port) for port in shape.get("ports") or ()),
            created_at=_unstamp(shape["created_at"]) or 0.0,
            expires_at=_unstamp(shape["expires_at"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise errors.RemoteProtocolError(f"the hive described a share in an unknown way: {exc!r}") from exc
