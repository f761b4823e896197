"""The files of a sandbox, of any recipe: read, write, list, move, upload, download."""

from __future__ import annotations

import base64
import contextlib
import os
import stat as stat_bits
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import anyio

from ash_mcp._answers import Fields, file_entry
from ash_mcp.errors import AshError, SandboxRefused
from ash_mcp.results import FileEntry

__all__ = ["CHUNK_BYTES", "Files", "OnBytes"]

CHUNK_BYTES: Final = 512 * 1024
"""Bytes per call: the most that the runner reads at once, and less than clients accept as one event."""

MOST_ENTRIES: Final = 1_000_000
"""The most entries that `list` takes of one directory: a sandbox could send them without end."""

_CLEANUP_SECONDS: Final = 5.0

OnBytes = Callable[[int, int | None], object]
"""Called after each piece with the bytes done and the total; None where that is not known."""


class RunnerCall(Protocol):
    """Calls one of the runner's tools and returns its structured content."""

    async def __call__(
        self, tool: str, arguments: Mapping[str, Any], *, repeatable: bool, timeout_seconds: float | None = None
    ) -> Fields: ...


class Files:
    """The files of one sandbox. Relative paths start at its workspace.

    Errors are `FileError`s; `FileNotFound` and the like are also the built-in `FileNotFoundError` and the like.
    """

    def __init__(self, call: RunnerCall) -> None:
        self._call = call

    async def read(self, path: str, *, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return a text file.

        Raises:
            FileError: There is no such file, or it cannot be read.
            UnicodeDecodeError: It is not text in that encoding; see `read_bytes`.
        """
        return (await self.read_bytes(path)).decode(encoding, errors)

    async def read_bytes(self, path: str) -> bytes:
        """Return the bytes of a file, of any size that fits in memory.

        Raises:
            FileError: There is no such file, or it cannot be read.
        """
        return b"".join([piece async for piece, _ in self._pieces(path)])

    async def write(self, path: str, data: str | bytes, *, mode: int | None = None) -> int:
        """Write a whole file, make its parent directories, and return its size in bytes.

        The file is replaced atomically, unless its directory cannot be written or it is a mount: then it is written in
        place.

        Args:
            path: The file.
            data: Its content; text is written as UTF-8.
            mode: Permission bits, such as `0o755`; None leaves them to the sandbox.

        Raises:
            FileError: It cannot be written.
        """
        raw = memoryview(data.encode() if isinstance(data, str) else data)
        starts = iter(range(0, len(raw), CHUNK_BYTES))

        async def read() -> memoryview:
            start = next(starts, len(raw))
            return raw[start : start + CHUNK_BYTES]

        return await self._send_pieces(path, read, mode)

    async def list(self, path: str = ".") -> list[FileEntry]:
        """Return the entries of a directory, sorted by name.

        An entry that is made or removed meanwhile may be missing or not; every other one is there once.

        Raises:
            FileError: There is no such directory.
            SandboxRefused: The sandbox sent an incomplete list, or more than a million entries.
        """
        stem = "" if path in ("", ".") else path.rstrip("/") + "/"
        found: list[FileEntry] = []
        arguments = {"path": path}
        while True:
            fields = await self._call("ash_file_list", arguments, repeatable=True)
            page = [file_entry(item, path=stem + item.text("name")) for item in fields.objects("entries")]
            found += page
            cursor = fields.optional_text("next_cursor")
            if cursor is None and not fields.flag("truncated", False):
                return found
            if cursor is None or not page or len(found) > MOST_ENTRIES:
                raise SandboxRefused(f"the sandbox does not come to the end of {path} after {len(found)} entries")
            arguments = {"path": path, "cursor": cursor}

    async def stat(self, path: str) -> FileEntry:
        """Return the type, size, mode and time of one path.

        Raises:
            FileNotFound: It does not exist.
        """
        return file_entry(await self._call("ash_file_stat", {"path": path}, repeatable=True), path=path)

    async def exists(self, path: str) -> bool:
        """Return whether `path` exists."""
        try:
            await self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    async def mkdir(self, path: str, *, parents: bool = True) -> None:
        """Make a directory. With `parents`, make its parents too, and accept one that exists.

        Raises:
            FileError: It cannot be made.
        """
        await self._call("ash_file_mkdir", {"path": path, "parents": parents}, repeatable=parents)

    async def move(self, source: str, destination: str) -> None:
        """Rename a file or directory.

        Raises:
            FileError: There is no such source, or it cannot be moved.
        """
        await self._call("ash_file_move", {"source": source, "destination": destination}, repeatable=False)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, or with `recursive` a directory and all in it.

        Raises:
            FileError: There is no such path, or it cannot be removed.
        """
        await self._call("ash_file_remove", {"path": path, "recursive": recursive}, repeatable=False)

    async def upload(self, source: str | os.PathLike[str], path: str, *, on_bytes: OnBytes | None = None) -> int:
        """Copy a local file into the sandbox with its permission bits and return its size.

        The file there is replaced atomically; an upload that fails leaves nothing.

        Raises:
            OSError: The local file cannot be read.
            FileError: The file in the sandbox cannot be written.
        """
        local = anyio.Path(source)
        info = await local.stat()

        def report(done: int) -> None:
            if on_bytes is not None:
                on_bytes(done, max(info.st_size, done))

        async with await local.open("rb") as file:
            return await self._send_pieces(
                path, lambda: file.read(CHUNK_BYTES), stat_bits.S_IMODE(info.st_mode), report
            )

    async def download(
        self, path: str, destination: str | os.PathLike[str], *, on_bytes: OnBytes | None = None
    ) -> int:
        """Copy a file of the sandbox to this machine and return its size; a download that fails leaves nothing.

        Raises:
            OSError: The local file cannot be written.
            FileError: The file in the sandbox cannot be read.
        """
        target = Path(destination)
        part = anyio.Path(target.with_name(f".{target.name}.{os.urandom(4).hex()}.part"))
        done = 0
        try:
            async with await part.open("xb") as file:
                async with contextlib.aclosing(self._pieces(path)) as pieces:
                    async for piece, size in pieces:
                        await file.write(piece)
                        done += len(piece)
                        if on_bytes is not None:
                            on_bytes(done, size)
            await part.replace(target)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await part.unlink(missing_ok=True)
            raise
        return done

    async def _pieces(self, path: str) -> AsyncGenerator[tuple[bytes, int], None]:
        """Yield the pieces of a file, each with the file's size as the sandbox states it."""
        offset = 0
        while True:
            arguments = {"path": path, "offset": offset, "limit": CHUNK_BYTES}
            fields = await self._call("ash_file_read", arguments, repeatable=True)
            piece, at_end = fields.base64("data_base64"), fields.flag("eof")
            offset += len(piece)
            yield piece, fields.integer("size")
            if at_end:
                return
            if not piece:
                raise SandboxRefused(f"the sandbox sent nothing of {path} and did not say that it ends")

    async def _send_pieces(
        self,
        path: str,
        read: Callable[[], Awaitable[bytes | memoryview]],
        mode: int | None,
        report: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Send the pieces that `read` returns until an empty one; the last one commits the file."""
        key, done, several, piece = uuid.uuid4().hex, 0, False, await read()
        try:
            while True:
                following = await read()
                several = several or bool(following)
                await self._send_piece(path, key, piece, done, mode, None if following else "commit")
                done += len(piece)
                report(done)
                if not following:
                    return done
                piece = following
        except BaseException:
            if several:
                with anyio.move_on_after(_CLEANUP_SECONDS, shield=True), contextlib.suppress(AshError):
                    await self._send_piece(path, key, b"", 0, None, "abandon")
            raise

    async def _send_piece(
        self, path: str, key: str, piece: bytes | memoryview, offset: int, mode: int | None, end: str | None
    ) -> None:
        # A piece that comes twice is there once, so a lost answer does no harm.
        arguments = {
            "path": path,
            "key": key,
            "data_base64": base64.b64encode(piece).decode(),
            "offset": offset,
            "mode": mode,
            "end": end,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        await self._call("ash_file_write", given, repeatable=True)
