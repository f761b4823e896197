"""The verdict on an answer: the error that it stands for, by whether the hive or a sandbox sent it. Pure.

The hive marks every response with its origin. A typed failure is accepted only on the hive's own responses, or in a
sandbox's stream when it carries the nonce of that response's head, which the sandbox never sees: no sandbox can pass
its failure off as the hive's.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ash_mcp._protocol import as_object
from ash_mcp.errors import (
    AshError,
    ConfigError,
    HiveFault,
    RemoteProtocolError,
    SandboxRefused,
    TransportError,
    Unauthenticated,
    Unsupported,
)
from ash_mcp.wire import (
    FAILURE_META_KEY,
    HEADER_NONCE,
    HEADER_ORIGIN,
    ORIGIN_HUB,
    ORIGIN_SANDBOX,
    failure_from_json,
)

__all__ = ["Head", "error_of_message", "error_of_status", "is_result_lost", "misbehaviour"]

_METHOD_NOT_FOUND: Final = -32601
_INVALID_PARAMS: Final = -32602
_LOST_KINDS: Final = frozenset({"abandoned", "job_not_found", "result_lost"})
_GATEWAY_STATUSES: Final = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class Head:
    """The status and headers of a response that decide how its body is read."""

    status: int
    content_type: str
    origin: str | None
    nonce: str | None

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str]) -> Head:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        return cls(status, kind, headers.get(HEADER_ORIGIN), headers.get(HEADER_NONCE) or None)

    @property
    def is_stream(self) -> bool:
        return self.content_type == "text/event-stream"

    @property
    def from_hub(self) -> bool:
        return self.origin == ORIGIN_HUB

    @property
    def from_sandbox(self) -> bool:
        return self.origin == ORIGIN_SANDBOX


def error_of_message(head: Head, message: Mapping[str, Any]) -> AshError | None:
    """Return the failure that an answer means, or None when it holds a result of the tool."""
    result = as_object(message.get("result"))
    if result is None:
        return _error_of_rpc(head, message)
    failure = _trusted_failure(head, result)
    if failure is not None:
        return failure
    if result.get("resultType") == "input_required":
        return Unsupported("the tool asks its caller a question, and this SDK has nobody to ask; use an MCP host")
    return None


def _trusted_failure(head: Head, result: Mapping[str, Any]) -> AshError | None:
    meta = as_object(result.get("_meta")) or {}
    if result.get("isError") is not True or FAILURE_META_KEY not in meta:
        return None
    if head.from_hub or (head.is_stream and _has_nonce(head, meta)):
        return failure_from_json(meta[FAILURE_META_KEY])
    return None


def _has_nonce(head: Head, meta: Mapping[str, Any]) -> bool:
    nonce = meta.get(HEADER_NONCE)
    if head.nonce is None or not isinstance(nonce, str):
        return False
    return hmac.compare_digest(nonce.encode("utf-8", "replace"), head.nonce.encode("utf-8", "replace"))


def _error_of_rpc(head: Head, message: Mapping[str, Any]) -> AshError:
    """Return what a JSON-RPC error means; its `data` is typed when the hive sent it."""
    error = as_object(message.get("error"))
    if error is None:
        return misbehaviour(head, "answered with neither a result nor an error")
    text, code = str(error.get("message", "")), error.get("code")
    if head.from_sandbox:
        return SandboxRefused(text or "the sandbox refused the call", code=code)
    if not head.from_hub:
        return RemoteProtocolError(f"what answered is not a hive of Ash: {text}")
    data = as_object(error.get("data")) or {}
    shape = data.get(FAILURE_META_KEY, data)
    if "kind" in (as_object(shape) or {}):
        return failure_from_json(shape)
    if code == _METHOD_NOT_FOUND:
        return Unsupported(text)
    return ConfigError(text) if code == _INVALID_PARAMS else HiveFault(text)


def error_of_status(head: Head, body: Mapping[str, Any] | None) -> AshError | None:
    """Return the failure that a whole JSON body with its status means, or None when it holds an answer."""
    error = as_object((body or {}).get("error"))
    if head.from_hub and error is not None and "kind" in error:
        return failure_from_json(error)
    if body is not None and body.get("jsonrpc") == "2.0" and ("result" in body or error is not None):
        return None
    if head.status < 300 or head.from_sandbox:
        return misbehaviour(head, f"answered {head.status} with a body that is not a JSON-RPC message")
    return _untyped_error(head.status)


def _untyped_error(status: int) -> AshError:
    """Return what an untyped refusal means: it comes from a proxy on the way, or from no hive at all."""
    if status in _GATEWAY_STATUSES:
        return TransportError(
            f"a gateway before the hive answered {status}; look whether the hive runs", status=status
        )
    if status in (401, 403):
        return Unauthenticated(f"something before the hive answered {status}; check ASH_TOKEN")
    return RemoteProtocolError(f"what answered {status} is not a hive of Ash; check ASH_URL", status=status)


def is_result_lost(head: Head, result: Mapping[str, Any]) -> bool:
    """Return whether a sandbox no longer has the result of a call whose caller did not come back in time."""
    error = as_object((as_object(result.get("structuredContent")) or {}).get("error")) or {}
    return head.from_sandbox and result.get("isError") is True and error.get("kind") in _LOST_KINDS


def misbehaviour(head: Head, what: str) -> AshError:
    """Return the error for an answer that makes no sense.

    A sandbox's is a `SandboxRefused`, which is trainable: as a failure of the hive's, a sandbox could have its own
    failures left out of training.
    """
    if head.from_sandbox:
        return SandboxRefused(f"the sandbox {what}")
    return RemoteProtocolError(f"the hive {what}")
