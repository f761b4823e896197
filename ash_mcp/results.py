"""What calls to a sandbox return: frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CallResult",
    "Chunk",
    "ExecResult",
    "FileEntry",
    "JobInfo",
    "JobOutput",
    "JobResult",
    "Progress",
]

StreamName = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class Progress:
    """News about a call that is under way."""

    done: float
    total: float | None = None
    """None where the end is not known."""
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """What a sandbox's tool answered. `is_error` is the tool's own word; it raises nothing."""

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
    """What it exited with, negative for a signal; None when it was stopped at its timeout."""
    stdout: str
    """UTF-8; what is not is shown as U+FFFD, and whole in `stdout_raw`."""
    stderr: str
    stdout_raw: bytes = field(repr=False)
    stderr_raw: bytes = field(repr=False)
    stdout_bytes: int
    """How much the command wrote, also beyond what is kept here."""
    stderr_bytes: int
    duration_seconds: float
    timed_out: bool
    truncated: bool
    output_file: str | None = None
    """Where in the sandbox all of it is kept, when truncated."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a running command's output."""

    data: bytes
    stream: StreamName
    offset: int
    """Where it begins in the output of both streams together, in the order in which it came; a gap is a loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutput:
    """What one read of a job returned."""

    chunks: Sequence[Chunk]
    next_offset: int
    total_bytes: int
    dropped_bytes: int
    """How much of the oldest output the sandbox let go, unread or not: its memory of a job is bounded."""
    running: bool
    exit_code: int | None = None
    timed_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job, or a streamed command, ended."""

    exit_code: int | None
    timed_out: bool
    total_bytes: int
    """All that it wrote."""
    lost_bytes: int
    """How much of that this reader can not have any more; 0 when every byte came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    id: str
    command: str
    running: bool
    exit_code: int | None = None
    started_at: str | float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One entry of a directory in a sandbox."""

    name: str
    path: str
    type: Literal["file", "directory", "symlink", "other"]
    size: int
    mode: int
    """The permission bits."""
    modified_at: str | float | None = None
