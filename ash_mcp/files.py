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
import anyio.to_thread

from ash_mcp._answers import Fields, file_entry
from ash_mcp._file_door import FileDoor, OnBytes
from ash_mcp.errors import AshError, IsADirectory, SandboxRefused
from ash_mcp.results import FileEntry

__all__ = ["CHUNK_BYTES", "Files", "OnBytes"]

DOOR_BYTES: Final = 256 * 1024
"""Longer files are copied through the hive's door to files, which takes bytes as they are."""

CHUNK_BYTES: Final = 512 * 1024
"""Bytes per call: the most that the runner reads at once, and less than clients accept as one event."""

MOST_ENTRIES: Final = 1_000_000
"""The most entries that `list` takes of one directory: a sandbox could send them without end."""

_CLEANUP_SECONDS: Final = 5.0


class RunnerCall(Protocol):
    """Calls one of the runner's tools and returns its structured content."""

    async def __call__(
        self, tool: str, arguments: Mapping[str, Any], *, repeatable: bool, timeout_seconds: float | None = None
    ) -> Fields: ...


class Files:
    """The files of one sandbox. Relative paths start at its workspace.

    Errors are `FileError`s; `FileNotFound` and the like are also the built-in `FileNotFoundError` and the like.
    """

    def __init__(self, call: RunnerCall, door: FileDoor) -> None:
        self._call = call
        self.door = door
        """Takes bytes as they are; `upload` and `download` use it where it pays."""

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
        """Copy a local file into the sandbox with its permission bits, or a folder with all in it; return the bytes.

        A file there is replaced atomically. A folder is made where there is none; what it has of the same names is
        replaced, and nothing before all has come. A copy that fails leaves nothing.

        Raises:
            OSError: What is here cannot be read.
            ConfigError: In the folder is a link that leads out of it, or what is neither file, folder nor link.
            FileError: It cannot be written in the sandbox.
        """
        local = anyio.Path(source)
        info = await local.stat()

        def report(done: int) -> None:
            if on_bytes is not None:
                on_bytes(done, max(info.st_size, done))

        if stat_bits.S_ISDIR(info.st_mode):
            from ash_mcp._archives import Packing
            from ash_mcp._folders import send_folder

            packing = await anyio.to_thread.run_sync(Packing, Path(source))
            return await send_folder(self.door, packing, path, on_bytes)
        mode = stat_bits.S_IMODE(info.st_mode)
        if info.st_size > DOOR_BYTES:
            fields = await self.door.put(_of_file(path), lambda: _pieces_of(local, report), mode=mode)
            return fields.integer("bytes")
        async with await local.open("rb") as file:
            return await self._send_pieces(path, lambda: file.read(CHUNK_BYTES), mode, report)

    async def download(
        self, path: str, destination: str | os.PathLike[str], *, on_bytes: OnBytes | None = None
    ) -> int:
        """Copy a file of the sandbox to this machine, or a folder with all in it; return the bytes.

        A file that fails leaves nothing. Of a folder each file is whole or not there; pipes and devices are left out.

        Raises:
            OSError: It cannot be written here; also where a link stands in place of a folder.
            FileError: It cannot be read in the sandbox.
            SandboxRefused: A name or a link of the sandbox would lead out of the folder.
        """
        target = Path(destination)

        async def attempt() -> int:
            return await self._download_file(path, target, on_bytes)

        try:
            return await self.door.again(attempt)
        except IsADirectory:
            from ash_mcp._folders import receive_folder

            return (await receive_folder(self.door, path, target, on_bytes)).bytes

    async def _download_file(self, path: str, target: Path, on_bytes: OnBytes | None) -> int:
        part = anyio.Path(target.with_name(f".{target.name}.{os.urandom(4).hex()}.part"))
        done = 0
        try:
            async with await part.open("xb") as file:
                async with contextlib.aclosing(self._file(path)) as pieces:
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

    async def _file(self, path: str) -> AsyncGenerator[tuple[bytes, int | None], None]:
        """Yield the pieces of a file with its size: of a short one by a call, of a longer one through the door."""
        arguments = {"path": path, "offset": 0, "limit": DOOR_BYTES}
        fields = await self._call("ash_file_read", arguments, repeatable=True)
        if fields.flag("eof"):
            yield fields.base64("data_base64"), fields.integer("size")
            return
        async with self.door.get(_of_file(path)) as (pieces, size):
            async for piece in pieces:
                yield piece, size

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


async def _pieces_of(local: anyio.Path, report: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """Yield a file's bytes, and report each piece when the next one is asked for."""
    done = 0
    async with await local.open("rb") as file:
        while piece := await file.read(CHUNK_BYTES):
            yield piece
            done += len(piece)
            report(done)


def _of_file(path: str) -> str:
    """Return a path as the door takes a file's: with a slash at its end it would be a folder's."""
    return path.rstrip("/") or "/"
