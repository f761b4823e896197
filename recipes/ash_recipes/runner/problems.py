"""Failures inside a sandbox, by kind. They are the sandbox's own word and never taken as the hive's."""

from __future__ import annotations

import errno
from typing import Any, Literal

__all__ = ["Problem", "from_os_error", "refusal"]

Kind = Literal[
    "file_not_found",
    "is_a_directory",
    "not_a_directory",
    "file_exists",
    "not_permitted",
    "no_space",
    "file_error",
    "job_not_found",
    "pty_not_found",
    "result_lost",
    "bad_request",
    "spawn_failed",
    "abandoned",
    "no_network",
    "fetch_failed",
    "search_failed",
]

_BY_ERRNO: dict[int, Kind] = {
    errno.ENOENT: "file_not_found",
    errno.EISDIR: "is_a_directory",
    errno.ENOTDIR: "not_a_directory",
    errno.EEXIST: "file_exists",
    errno.ENOTEMPTY: "file_exists",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
    errno.EROFS: "not_permitted",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "no_space",
    errno.ENAMETOOLONG: "bad_request",
    errno.EINVAL: "bad_request",
    errno.ELOOP: "bad_request",
}

_HTTP: dict[Kind, int] = {
    "file_not_found": 404,
    "not_permitted": 403,
    "is_a_directory": 409,
    "not_a_directory": 409,
    "file_exists": 409,
    "no_space": 507,
    "bad_request": 400,
    "file_error": 500,
}


class Problem(Exception):
    """A failure with its kind and a sentence for the caller."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message

    @property
    def http_status(self) -> int:
        return _HTTP.get(self.kind, 500)

    def to_json(self) -> dict[str, Any]:
        """The shape of the private surface's errors."""
        return {"error": {"kind": self.kind, "message": self.message, "retryable": False, "trainable": True}}

    def to_tool_result(self) -> dict[str, Any]:
        """The shape of a failed tool call."""
        return {
            "content": [{"type": "text", "text": self.message}],
            "structuredContent": {"error": {"kind": self.kind, "message": self.message}},
            "isError": True,
        }


def refusal(kind: str, message: str, *, retryable: bool = False) -> dict[str, Any]:
    """Return the body of an answer by which the runner itself refuses a request."""
    said = " ".join(message.split())
    return {"error": {"kind": kind, "message": said, "retryable": retryable, "trainable": False}}


def from_os_error(exc: OSError, path: str) -> Problem:
    """Translate what the system said about `path`."""
    kind = _BY_ERRNO.get(exc.errno or 0, "file_error")
    words = (exc.strerror or str(exc)).lower()
    return Problem(kind, f"{path}: {words}")
