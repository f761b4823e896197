"""A command whose output goes to callbacks as it comes, and is kept for its result all the same."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Final

import anyio

from ash_mcp.jobs import OutputStream
from ash_mcp.results import ExecResult, StreamName

__all__ = ["OUTPUT_LIMIT", "watch"]

OUTPUT_LIMIT: Final = 262_144
"""How many bytes of each stream a result keeps where its caller does not say: as many as `ash_exec` does."""

OnText = Callable[[str], object]


class _Kept:
    """The first and the last bytes of one stream, and who is told of all of it."""

    def __init__(self, limit: int, on_text: OnText | None) -> None:
        self._head_limit, self._tail_limit = limit - limit // 2, limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._on_text = on_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.total = 0

    def take(self, data: bytes, *, last: bool = False) -> None:
        self.total += len(data)
        room = self._head_limit - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        del self._tail[: max(0, len(self._tail) - self._tail_limit)]
        text = self._decoder.decode(data, last)
        if text and self._on_text is not None:
            self._on_text(text)

    @property
    def left_out(self) -> int:
        return self.total - len(self._head) - len(self._tail)

    @property
    def data(self) -> bytes:
        return bytes(self._head + self._tail)

    def text(self) -> str:
        if not self.left_out:
            return self.data.decode("utf-8", "replace")
        head, tail = (bytes(part).decode("utf-8", "replace") for part in (self._head, self._tail))
        return f"{head}\n[… {self.left_out} bytes left out …]\n{tail}"


async def watch(stream: OutputStream, on_stdout: OnText | None, on_stderr: OnText | None, *, limit: int) -> ExecResult:
    """Run a command to its end and return its result; it ends with the call, if that is cancelled or a callback fails.

    Args:
        limit: How many bytes of each stream the result keeps.
    """
    began = anyio.current_time()
    kept: dict[StreamName, _Kept] = {"stdout": _Kept(limit, on_stdout), "stderr": _Kept(limit, on_stderr)}
    async with stream:
        async for chunk in stream:
            kept[chunk.stream].take(chunk.data)
    for each in kept.values():
        each.take(b"", last=True)
    stdout, stderr, result = kept["stdout"], kept["stderr"], stream.result
    return ExecResult(
        exit_code=result.exit_code,
        stdout=stdout.text(),
        stderr=stderr.text(),
        stdout_raw=stdout.data,
        stderr_raw=stderr.data,
        stdout_bytes=stdout.total,
        stderr_bytes=stderr.total,
        duration_seconds=anyio.current_time() - began,
        timed_out=result.timed_out,
        truncated=stdout.left_out + stderr.left_out > 0,
    )
