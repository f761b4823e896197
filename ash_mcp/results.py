"""Result types of calls to a sandbox. All are frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ash_mcp.types import ShareInfo

__all__ = [
    "CallResult",
    "Chunk",
    "ExecResult",
    "FileEntry",
    "JobInfo",
    "JobOutput",
    "JobResult",
    "Line",
    "Progress",
    "PtyInfo",
    "Share",
]

StreamName = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a running call."""

    done: float
    """In the tool's own unit; NaN where it named none."""
    total: float | None = None
    """None where the end is not known."""
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """The result of a sandbox's tool. One with `is_error` is returned like any other, not raised."""

    text: str
    """The text blocks of the content, joined by line breaks."""
    structured: Any
    """The structured content, or None."""
    content: Sequence[Mapping[str, Any]]
    is_error: bool
    raw: Mapping[str, Any] = field(repr=False)
    """The whole result as it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """How a command ended."""

    exit_code: int | None
    """128 and the signal's number when a signal ended it, also at its timeout; None where the sandbox sent none."""
    stdout: str
    """Decoded as UTF-8, other bytes as U+FFFD; `stdout_raw` has the bytes."""
    stderr: str
    stdout_raw: bytes = field(repr=False)
    stderr_raw: bytes = field(repr=False)
    stdout_bytes: int
    """How many bytes the command wrote, those beyond the limit included."""
    stderr_bytes: int
    duration_seconds: float
    timed_out: bool
    truncated: bool
    """Whether one of the streams was over the limit: its middle is left out."""
    output_file: str | None = None
    """The file in the sandbox that has all of the output, when truncated."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a running command's output."""

    data: bytes
    stream: StreamName
    offset: int
    """Where it begins, in the bytes of both streams together as they came; a gap before it is lost output."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a running command's output."""

    text: str
    """Without its line break, decoded as UTF-8 with U+FFFD for other bytes."""
    stream: StreamName


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutput:
    """What one read of a job returned."""

    chunks: Sequence[Chunk]
    next_offset: int
    total_bytes: int
    dropped_bytes: int
    """How many bytes of the oldest output the sandbox has dropped, read or not: it keeps the last 8 MiB."""
    running: bool
    exit_code: int | None = None
    """As in `ExecResult`; None while it runs."""
    timed_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job, or a streamed command, ended."""

    exit_code: int | None
    """As in `ExecResult`."""
    timed_out: bool
    total_bytes: int
    """How many bytes it wrote."""
    lost_bytes: int
    """How many of them this reader missed; 0 when it got every byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """One job of a sandbox, as `Sandbox.jobs` lists it."""

    id: str
    command: str
    running: bool
    exit_code: int | None = None
    """As in `ExecResult`; None while it runs."""
    started_at: str | float | None = None
    """As the sandbox sent it: its runner sends ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PtyInfo:
    """One terminal of a sandbox, as `Sandbox.ptys` lists it."""

    id: str
    command: str
    running: bool
    attached: bool
    """Whether somebody is attached to it."""
    exit_code: int | None = None
    """As in `ExecResult`; None while it runs."""
    started_at: str | float | None = None
    """As the sandbox sent it: its runner sends ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One entry of a directory in a sandbox."""

    name: str
    path: str
    type: Literal["file", "directory", "symlink", "other"]
    size: int
    """In bytes."""
    mode: int
    """The permission bits."""
    modified_at: str | float | None = None
    """As the sandbox sent it: its runner sends ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A new share of a sandbox, with its token, which is shown this once."""

    info: ShareInfo
    url: str
    """The MCP endpoint that it opens."""
    token: str = field(repr=False)
    previews: Mapping[int, str] = field(default_factory=dict[int, str], repr=False)
    """The URLs that open its ports in a browser, by port, each with the token; none where browsers have no way."""

    @property
    def id(self) -> str:
        """The public part of the token, by which it is listed and revoked."""
        return self.info.id

    @property
    def headers(self) -> dict[str, str]:
        """What an MCP client sends to `url`."""
        return {"Authorization": f"Bearer {self.token}"}
