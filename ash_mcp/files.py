"""The files of a sandbox, through its runner: they work with every recipe. Relative paths start at the workspace."""

from __future__ import annotations

import base64
import contextlib
import os
import stat as stat_bits
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import anyio

from ash_mcp._answers import Fields, file_entry
from ash_mcp.errors import SandboxRefused
from ash_mcp.results import FileEntry

__all__ = ["CHUNK_BYTES", "Files", "OnBytes"]

CHUNK_BYTES: Final = 512 * 1024
"""What travels in one call: the most that the runner reads at once, and below what clients take as one event."""

OnBytes = Callable[[int, int | None], object]
"""Called with the bytes done and the total after each piece."""


class RunnerCall(Protocol):
    """Calls one of the runner's tools and returns its structured content."""

    async def __call__(
        self, tool: str, arguments: Mapping[str, Any], *, repeatable: bool, timeout_seconds: float | None = None
    ) -> Fields: ...


class Files:
    """The files of one sandbox. Errors are `FileError`s, which are also the built-in ones where those exist."""

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
        """Return the bytes of a file, however large: it must fit in memory.

        Raises:
            FileError: There is no such file, or it cannot be read.
        """
        return b"".join([piece async for piece, _ in self._pieces(path)])

    async def write(self, path: str, data: str | bytes, *, mode: int | None = None) -> int:
        """Write a file anew, its parents made, and return how many bytes it has.

        Args:
            path: Where.
            data: Text is written as UTF-8.
            mode: Permission bits, such as `0o755`; None leaves them to the sandbox.

        Raises:
            FileError: It cannot be written.
        """
        raw = memoryview(data.encode() if isinstance(data, str) else data)
        await self._put(path, raw[:CHUNK_BYTES], 0, mode)
        for offset in range(CHUNK_BYTES, len(raw), CHUNK_BYTES):
            await self._put(path, raw[offset : offset + CHUNK_BYTES], offset, None)
        return len(raw)

    async def list(self, path: str = ".") -> list[FileEntry]:
        """Return what is in a directory.

        Raises:
            FileError: There is no such directory.
        """
        fields = await self._call("ash_file_list", {"path": path}, repeatable=True)
        stem = "" if path in ("", ".") else path.rstrip("/") + "/"
        return [file_entry(item, path=stem + item.text("name")) for item in fields.objects("entries")]

    async def stat(self, path: str) -> FileEntry:
        """Return what is known of one path.

        Raises:
            FileNotFound: There is nothing.
        """
        return file_entry(await self._call("ash_file_stat", {"path": path}, repeatable=True), path=path)

    async def exists(self, path: str) -> bool:
        """Say whether there is anything at `path`."""
        try:
            await self.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    async def mkdir(self, path: str, *, parents: bool = True) -> None:
        """Make a directory; one that exists is left as it is when `parents` is true.

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

        Raises:
            OSError: The local file cannot be read.
            FileError: The file in the sandbox cannot be written.
        """
        local = anyio.Path(source)
        total = (info := await local.stat()).st_size
        done = 0
        async with await local.open("rb") as file:
            mode: int | None = stat_bits.S_IMODE(info.st_mode)
            while (piece := await file.read(CHUNK_BYTES)) or done == 0:
                await self._put(path, memoryview(piece), done, mode)
                done, mode = done + len(piece), None
                if on_bytes is not None:
                    on_bytes(done, max(total, done))
                if not piece:
                    break
        return done

    async def download(
        self, path: str, destination: str | os.PathLike[str], *, on_bytes: OnBytes | None = None
    ) -> int:
        """Copy a file of the sandbox here and return its size; a download that breaks leaves nothing.

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
        """Yield the pieces of a file, each with the file's size as the sandbox said it."""
        offset = 0
        while True:
            asked = {"path": path, "offset": offset, "limit": CHUNK_BYTES}
            fields = await self._call("ash_file_read", asked, repeatable=True)
            piece, at_end = fields.base64("data_base64"), fields.flag("eof")
            offset += len(piece)
            yield piece, fields.integer("size")
            if at_end:
                return
            if not piece:
                raise SandboxRefused(f"the sandbox sent nothing of {path} and did not say that it ends")

    async def _put(self, path: str, piece: memoryview, offset: int, mode: int | None) -> None:
        # The same bytes at the same place twice are there once, so a lost answer does no harm.
        asked: dict[str, Any] = {
            "path": path,
            "data_base64": base64.b64encode(piece).decode(),
            "offset": offset,
        }
        if mode is not None:
            asked["mode"] = mode
        await self._call("ash_file_write", asked, repeatable=True)
