"""Parsers of the results of a sandbox's tools into typed values. Pure.

A sandbox is not trusted: a needed field that is missing or of another type is a `SandboxRefused`, never a crash.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar, cast

from ash_mcp import errors
from ash_mcp._protocol import as_object
from ash_mcp.errors import AshError, SandboxRefused
from ash_mcp.results import CallResult, Chunk, ExecResult, FileEntry, JobInfo, JobOutput, PtyInfo

__all__ = [
    "Fields",
    "call_result",
    "exec_result",
    "file_entry",
    "job_info",
    "job_output",
    "pty_info",
    "runner_error",
    "runner_fields",
]

T = TypeVar("T")

_RUNNER_ERRORS: Final[Mapping[str, type[AshError]]] = {
    cls.kind: cls
    for cls in (
        errors.CommandNotStarted,
        errors.FileError,
        errors.FileExists,
        errors.FileNotFound,
        errors.FileNotPermitted,
        errors.IsADirectory,
        errors.JobNotFound,
        errors.NoSpace,
        errors.NotADirectory,
        errors.PtyNotFound,
        errors.ResultLost,
    )
} | {"bad_request": errors.BadArguments}
"""The error kinds that a runner's tool may answer with. Any other kind becomes a plain `SandboxRefused`."""


def call_result(raw: Mapping[str, Any]) -> CallResult:
    """Parse the result of any tool; content of an unknown shape is left out."""
    blocks = raw.get("content")
    content = [as_object(block) or {} for block in cast("list[Any]", blocks)] if isinstance(blocks, list) else []
    text = "\n".join(str(block.get("text", "")) for block in content if block.get("type") == "text")
    return CallResult(
        text=text,
        structured=raw.get("structuredContent"),
        content=content,
        is_error=raw.get("isError") is True,
        raw=raw,
    )


def runner_fields(raw: Mapping[str, Any]) -> Fields:
    """Return the fields of the structured content of one of the runner's tools (`ash_exec`, `ash_job_read`, ...).

    Raises:
        SandboxRefused: The tool failed; the error kind selects a subclass. What the sandbox says of `retryable` or
            `trainable` is ignored.
        BadArguments: The tool rejected the arguments.
    """
    result = call_result(raw)
    if not result.is_error:
        return Fields(result.structured)
    error = as_object((as_object(result.structured) or {}).get("error")) or {}
    raise runner_error(error, result.text)


def runner_error(error: Mapping[str, Any], text: str = "") -> AshError:
    """Return what a runner's `{"kind", "message"}` means; it is always a `SandboxRefused`."""
    cls = _RUNNER_ERRORS.get(str(error.get("kind")), SandboxRefused)
    return cls(str(error.get("message") or text or "the sandbox refused without a message"))


class Fields:
    """Typed access to the fields of a JSON object that a sandbox sent. A field that is null counts as missing.

    Raises:
        SandboxRefused: The value is no object, a field without a default is missing, or a field is of another type.
    """

    def __init__(self, shape: Any) -> None:
        if not isinstance(shape, Mapping):
            raise SandboxRefused("the sandbox answered without structured content; is its runner Ash's?")
        self._shape = cast("Mapping[str, Any]", shape)

    def _get(self, name: str, kind: type[T], default: T | None) -> T:
        value = self._shape.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SandboxRefused(f"the sandbox answered in an unknown way: {name!r} is {value!r:.80}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        return self._get(name, str, default)

    def integer(self, name: str, default: int | None = None) -> int:
        return self._get(name, int, default)

    def flag(self, name: str, default: bool | None = None) -> bool:
        return self._get(name, bool, default)

    def optional_text(self, name: str) -> str | None:
        return None if self._shape.get(name) is None else self.text(name)

    def optional_integer(self, name: str) -> int | None:
        return None if self._shape.get(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        value = self._shape.get(name)
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else self._get(name, float, None)

    def timestamp(self, name: str) -> str | float | None:
        """Return a time as it was sent (a runner sends ISO 8601); None where it is missing or of another type."""
        value = self._shape.get(name)
        return value if isinstance(value, str | float | int) else None

    def base64(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.text(name), validate=True)
        except binascii.Error as exc:
            raise SandboxRefused(f"the sandbox answered in an unknown way: {name!r} is not base64") from exc

    def object(self, name: str) -> Mapping[str, Any]:
        """Return an object as it came; empty where there is none."""
        return as_object(self._shape.get(name)) or {}

    def objects(self, name: str) -> list[Fields]:
        return [Fields(item) for item in cast("list[Any]", self._get(name, list, None))]

    def command(self, name: str) -> str:
        """Read a command, which is a string or a list of words."""
        value = self._shape.get(name)
        return " ".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else self.text(name)

    def mode(self, name: str) -> int:
        """Read permission bits, a number or octal digits."""
        value = self._shape.get(name)
        try:
            return int(value, 8) if isinstance(value, str) else self.integer(name)
        except ValueError as exc:
            raise SandboxRefused(f"the sandbox answered in an unknown way: {name!r} is {value!r:.80}") from exc

    def has(self, name: str) -> bool:
        """Return whether a field is there and not null."""
        return self._shape.get(name) is not None


def exec_result(fields: Fields) -> ExecResult:
    """Parse the result of `ash_exec`, which has a stream's bytes in base64 only where they are not UTF-8."""
    stdout, stderr = fields.text("stdout"), fields.text("stderr")
    return ExecResult(
        exit_code=fields.optional_integer("exit_code"),
        stdout=stdout,
        stderr=stderr,
        stdout_raw=fields.base64("stdout_base64")
        if fields.has("stdout_base64")
        else stdout.encode("utf-8", "replace"),
        stderr_raw=fields.base64("stderr_base64")
        if fields.has("stderr_base64")
        else stderr.encode("utf-8", "replace"),
        stdout_bytes=fields.integer("stdout_bytes"),
        stderr_bytes=fields.integer("stderr_bytes"),
        duration_seconds=fields.number("duration_seconds"),
        timed_out=fields.flag("timed_out"),
        truncated=fields.flag("truncated"),
        output_file=fields.optional_text("output_file"),
    )


def job_output(fields: Fields) -> JobOutput:
    """Parse the result of `ash_job_read`."""
    return JobOutput(
        chunks=[_chunk(item) for item in fields.objects("chunks")],
        next_offset=fields.integer("next_offset"),
        total_bytes=fields.integer("total_bytes"),
        dropped_bytes=fields.integer("dropped_bytes", 0),
        running=fields.text("state") == "running",
        exit_code=fields.optional_integer("exit_code"),
        timed_out=fields.flag("timed_out", False),
    )


def _chunk(fields: Fields) -> Chunk:
    stream: Literal["stdout", "stderr"] = "stderr" if fields.text("stream") == "stderr" else "stdout"
    return Chunk(data=fields.base64("data_base64"), stream=stream, offset=fields.integer("offset"))


def job_info(fields: Fields) -> JobInfo:
    return JobInfo(
        id=fields.text("job"),
        command=fields.command("command"),
        running=fields.text("state") == "running",
        exit_code=fields.optional_integer("exit_code"),
        started_at=fields.timestamp("started_at"),
    )


def pty_info(fields: Fields) -> PtyInfo:
    return PtyInfo(
        id=fields.text("pty"),
        command=fields.command("command"),
        running=fields.text("state") == "running",
        attached=fields.flag("attached", False),
        exit_code=fields.optional_integer("exit_code"),
        started_at=fields.timestamp("started_at"),
    )


def file_entry(fields: Fields, *, path: str) -> FileEntry:
    """Parse a directory entry; `path` is used where the sandbox sent none."""
    kind: Any = fields.text("type")
    return FileEntry(
        name=fields.text("name"),
        path=fields.optional_text("path") or path,
        type=kind if kind in ("file", "directory", "symlink") else "other",
        size=fields.integer("size"),
        mode=fields.mode("mode"),
        modified_at=fields.timestamp("modified_at"),
    )
