"""The files of a sandbox over HTTP, below `/_ash/files`: bytes of any length, listings, and folders as tar archives.

A file is named by the path below the door, from the workspace on, or by `?path=…`. A path that ends with a slash is a
folder: GET lists it, PUT unpacks an archive into it. Everything is streamed, and nothing is read faster than it goes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from mimetypes import MimeTypes
from typing import BinaryIO, Final
from urllib.parse import parse_qs, unquote_to_bytes

import anyio
import anyio.from_thread
import anyio.to_thread
from starlette.types import Receive, Scope, Send

from ash_recipes.runner.answers import answer, ended_with_caller, header, refuse, send_pieces, start
from ash_recipes.runner.archives import pack, unpack
from ash_recipes.runner.files import Files
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.regular_files import Upload, etag_of

__all__ = ["FileDoor"]

PIECE_BYTES: Final = 524_288
UNPACKING: Final = 4
"""Archives that are unpacked at once; each takes a thread for as long as its caller takes to send it."""

TAR: Final = b"application/x-tar"
_METHODS: Final = "DELETE, GET, HEAD, PUT"
_RANGE: Final = re.compile(rb"bytes=(\d{0,18})-(\d{0,18})")
_TYPES: Final = MimeTypes(filenames=())
"""By the names that Python itself knows: no file of the sandbox is asked."""


@dataclass(frozen=True, slots=True)
class _Asked:
    path: str
    query: Mapping[str, list[str]]
    is_archive: bool

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true", "yes")


class FileDoor:
    """An ASGI app.

    Args:
        at: The path below which it is.
    """

    def __init__(self, files: Files, at: str) -> None:
        self._files = files
        self._at = at.encode()
        self._unpacking = anyio.CapacityLimiter(UNPACKING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        verbs: Mapping[str, Callable[[_Asked, Scope, Receive, Send], Awaitable[None]]] = {
            "GET": self._get,
            "HEAD": self._get,
            "PUT": self._put,
            "DELETE": self._delete,
        }
        verb = verbs.get(scope["method"])
        if verb is None:
            message = f"a sandbox's files take {_METHODS}"
            await refuse(send, 405, "bad_request", message, [(b"allow", _METHODS.encode())])
            return
        try:
            await verb(self._read(scope), scope, receive, send)
        except Problem as exc:
            await answer(send, exc.http_status, exc.to_json())

    def _read(self, scope: Scope) -> _Asked:
        # Bytes that are not UTF-8 become what Python uses for them in file names.
        text = scope["query_string"].decode("latin-1")
        try:
            query = parse_qs(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=8)
        except ValueError:
            raise Problem("bad_request", "the query has more than 8 fields") from None
        below = os.fsdecode(unquote_to_bytes(scope["raw_path"].removeprefix(self._at)))
        named = [*query.get("path", []), *([f".{below}" if below == "/" else below[1:]] if below else [])]
        if len(named) != 1:
            raise Problem("bad_request", "say one path: below files/, which is the workspace, or as ?path=…")
        wanted = header(scope, b"content-type" if scope["method"] == "PUT" else b"accept") or b""
        is_archive = query.get("archive", [""])[-1] == "tar" or wanted.partition(b";")[0].strip().lower() == TAR
        return _Asked(named[0], query, is_archive)

    # Out of the sandbox.

    async def _get(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        if asked.is_archive:
            root = await anyio.to_thread.run_sync(self._files.folder, asked.path)
            await self._stream(pack(root), TAR, scope, receive, send)
            return
        if asked.is_folder:
            lines = await anyio.to_thread.run_sync(self._files.list_lines, asked.path)
            await self._stream(lines, b"application/x-ndjson", scope, receive, send)
            return
        with await anyio.to_thread.run_sync(self._files.open, asked.path) as file:
            await self._send_file(asked.path, file, scope, receive, send)

    async def _stream(self, pieces: Iterator[bytes], kind: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        await start(send, 200, kind, None)
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        async with ended_with_caller(receive):
            await send_pieces(send, pieces)

    async def _send_file(self, path: str, file: BinaryIO, scope: Scope, receive: Receive, send: Send) -> None:
        found = os.fstat(file.fileno())
        kind = (_TYPES.guess_type(path)[0] or "application/octet-stream").encode()
        tag, size = etag_of(found), found.st_size
        if size == 0:  # it may be one of /proc, whose length nobody knows before its end
            first = await anyio.to_thread.run_sync(file.read, PIECE_BYTES)
            if first:
                await self._stream(_rest(file, first), kind, scope, receive, send)
                return
        about = [(b"etag", tag), (b"accept-ranges", b"bytes"), (b"cache-control", b"no-cache")]
        if _names(header(scope, b"if-none-match"), tag):
            await send({"type": "http.response.start", "status": 304, "headers": about})
            await send({"type": "http.response.body", "body": b""})
            return
        asked = header(scope, b"range")
        condition = header(scope, b"if-range")
        span = _span(asked, size) if asked is not None and condition in (None, tag) else None
        if span is not None and span[0] >= span[1]:
            more = [*about, (b"content-range", b"bytes */%d" % size)]
            await refuse(send, 416, "bad_request", f"{path} has {size} bytes", more)
            return
        begin, end = span or (0, size)
        if span is not None:
            about.append((b"content-range", b"bytes %d-%d/%d" % (begin, end - 1, size)))
        await start(send, 200 if span is None else 206, kind, end - begin, about)
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        async with ended_with_caller(receive):
            await send_pieces(send, _pieces(file, begin, end))

    # Into the sandbox.

    async def _put(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        if (header(scope, b"content-encoding") or b"identity").lower() != b"identity":
            await refuse(send, 415, "bad_request", "send the bytes as they are, without Content-Encoding")
            return
        if asked.is_folder or asked.is_archive:
            body = _Body(receive)
            unpacked = await anyio.to_thread.run_sync(
                unpack, body, asked.path, self._files.resolve(asked.path), limiter=self._unpacking
            )
            if unpacked is not None:
                await answer(send, 200, {"files": unpacked.files, "bytes": unpacked.bytes})
            return
        upload = await anyio.to_thread.run_sync(self._files.upload, asked.path, _mode(asked))
        try:
            if not _may_replace(scope, upload):
                await refuse(send, 412, "conflict", f"{asked.path} is not what the condition of the request names")
                return
            if not await _take(upload, receive):
                return
            written = await anyio.to_thread.run_sync(upload.finish)
        finally:
            upload.abandon()
        await answer(send, 200 if upload.existed else 201, {"bytes": written})

    async def _delete(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        path, recursive = asked.path, asked.flag("recursive")
        await anyio.to_thread.run_sync(lambda: self._files.remove(path, recursive=recursive))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class _Body:
    """The body of a request as a file that blocks, for a worker thread."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        """Return some bytes, none only at the end.

        Raises:
            EOFError: The caller has left before the end.
        """
        while not self._left and not self._ended:
            self._left, self._ended = anyio.from_thread.run(self._next)
        read, self._left = self._left[:size], self._left[size:]
        return read

    async def _next(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise EOFError
        return message.get("body", b""), not message.get("more_body")


async def _take(upload: Upload, receive: Receive) -> bool:
    """Write a request's whole body; return False where its caller has left before the end."""
    waiting = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        waiting += message.get("body", b"")
        has_ended = not message.get("more_body")
        if len(waiting) >= PIECE_BYTES or has_ended:
            await anyio.to_thread.run_sync(upload.write, bytes(waiting))
            waiting.clear()
        if has_ended:
            return True


def _mode(asked: _Asked) -> int | None:
    said = asked.query.get("mode", [None])[-1]
    if said is None:
        return None
    if re.fullmatch(r"0?[0-7]{3}", said) is None:
        raise Problem("bad_request", "mode is the permission bits in octal, such as 755")
    return int(said, 8)


def _names(condition: bytes | None, tag: bytes) -> bool:
    """Return whether an `If-None-Match` or `If-Match` names a file with this tag."""
    return condition is not None and (condition == b"*" or tag in [part.strip() for part in condition.split(b",")])


def _may_replace(scope: Scope, upload: Upload) -> bool:
    wanted, unwanted = header(scope, b"if-match"), header(scope, b"if-none-match")
    before = upload.before
    if before is None:
        return wanted is None
    tag = etag_of(before)
    return (wanted is None or _names(wanted, tag)) and not _names(unwanted, tag)


def _span(asked: bytes, size: int) -> tuple[int, int] | None:
    """Return begin and end of a range, empty where the file has no such bytes; None: all of it is sent."""
    found = _RANGE.fullmatch(asked.strip())
    if found is None or found.groups() == (b"", b""):
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size if int(last) else 0
    begin = int(first)
    end = min(size, int(last) + 1) if last else size
    if last and int(last) < begin:
        return None
    return begin, end


def _pieces(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    while begin < end:
        piece = file.read(min(PIECE_BYTES, end - begin))
        if not piece:  # the length was promised, so the answer must break off
            raise ConnectionAbortedError("a file became shorter while it was read")
        begin += len(piece)
        yield piece


def _rest(file: BinaryIO, first: bytes) -> Iterator[bytes]:
    yield first
    while piece := file.read(PIECE_BYTES):
        yield piece
