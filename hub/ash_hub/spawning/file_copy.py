"""Copies a file or a folder from one sandbox's runner to another's: the bytes pass, read as fast as they go."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Final

from ash_hub.spawning.sandbox_requests import error_text
from ash_mcp.errors import AshError, AshTimeout, NotFound, RemoteProtocolError, SandboxRefused, StreamBroken
from ash_mcp.types import Endpoint, SandboxId
from ash_mcp.wire import HEADER_TOKEN, file_query
from ash_router.bounds.limits import DEFAULT_LIMITS
from ash_router.http import framing
from ash_router.http.framing import ResponseHead
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.connection import Connection
from ash_router.upstream.pool import Answer, open_connection

__all__ = ["FilePlace", "copy_file"]

QUIET_SECONDS: Final = 120.0
"""How long nothing may move before the copy is given up."""
_CONNECT_SECONDS: Final = 5.0
_MAX_SAID_BYTES: Final = 64 * 1024
"""Of a runner's answer that is no file."""
_TAR: Final = b"application/x-tar"


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A file of a sandbox, or a folder if its path ends with a slash."""

    sandbox: SandboxId
    endpoint: Endpoint
    path: str


async def copy_file(source: FilePlace, target: FilePlace, tokens: CallTokens) -> int:
    """Copy, and return the bytes that passed. The target changes only when all of them have come.

    Args:
        source: Both are files, or both folders.

    Raises:
        NotFound: There is no such source; the message is its runner's.
        SandboxRefused: The target cannot be written; the message is its runner's.
        TransportError: A connection broke, or nothing moved for two minutes.
    """
    copying = _Copying(source, target, tokens)
    try:
        return await copying.run()
    finally:
        copying.close()


class _Copying:
    """The `Sink` of the source's answer. It begins the request to the target when the answer has begun."""

    def __init__(self, source: FilePlace, target: FilePlace, tokens: CallTokens) -> None:
        self._source = source
        self._target = target
        self._tokens = tokens
        self._from: Connection | None = None
        self._to: Connection | None = None
        self._refused: Answer | None = None
        """What the source says instead of the file."""
        self._chunked = False
        self._failed = asyncio.Event()
        self._error: AshError | None = None
        self._stored = Answer(_MAX_SAID_BYTES)
        self._moved_at = 0.0
        self._passed = 0

    async def run(self) -> int:
        self._to = await self._open(self._target)
        self._from = await self._open(self._source)
        self._touch()
        self._from.send(self._request("GET", self._source, b"accept: %b\r\n" % _TAR, 0), self)
        ends = [asyncio.ensure_future(event.wait()) for event in (self._stored.done, self._failed)]
        try:
            while not any(end.done() for end in ends):
                left = self._moved_at + QUIET_SECONDS - asyncio.get_running_loop().time()
                if left <= 0:
                    raise AshTimeout(f"the copy was given up: nothing moved for {QUIET_SECONDS:g} s")
                await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return self._outcome()

    def close(self) -> None:
        for connection in (self._from, self._to):
            if connection is not None:
                connection.close()

    def _outcome(self) -> int:
        if self._refused is not None:
            said = error_text(bytes(self._refused.body), f"{self._source.path} could not be read")
            raise NotFound(said, path=self._source.path)
        error = self._error or self._stored.error
        if self._stored.status >= 400:  # what it says explains why it did not read on
            said = error_text(bytes(self._stored.body), f"{self._target.path} could not be written")
            raise SandboxRefused(said, path=self._target.path)
        if error is not None:
            raise error
        if self._stored.status not in (200, 201):
            raise RemoteProtocolError(f"the sandbox answered the copy with {self._stored.status}")
        return self._passed

    # The source's answer.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        self._touch()
        if head is not None and head.status != 200:
            self._refused = Answer(_MAX_SAID_BYTES)
        if self._refused is not None:
            self._refused.received(head, data, complete)
            if self._refused.done.is_set():
                self._failed.set()
            return
        assert self._to is not None and self._from is not None
        if head is not None:
            self._chunked = head.length is None
            kind = b"content-type: %b\r\n" % (_TAR if self._target.path.endswith("/") else b"application/octet-stream")
            request, source = self._request("PUT", self._target, kind, head.length), self._from
            self._to.send(
                request, self._stored, more=True, on_pressure=lambda slow: source.pause() if slow else source.resume()
            )
        self._passed += len(data)
        if self._chunked:
            data = (framing.chunk(data) if data else b"") + (framing.LAST_CHUNK if complete else b"")
        self._to.send_more(data, more=not complete)

    def broken(self, error: AshError) -> None:
        self._error = (
            error if not isinstance(error, StreamBroken) else StreamBroken("the copy broke off at its source")
        )
        self._failed.set()

    # Inner steps.

    async def _open(self, place: FilePlace) -> Connection:
        make = partial(
            Connection,
            place.endpoint,
            lambda connection, reusable: None,
            max_head_bytes=DEFAULT_LIMITS.max_head_bytes,
            max_headers=DEFAULT_LIMITS.max_headers,
        )
        endpoint = place.endpoint.of(place.sandbox)
        return await open_connection(endpoint, make, self._tokens.sandbox_keys, timeout_seconds=_CONNECT_SECONDS)

    def _request(self, method: str, place: FilePlace, lines: bytes, length: int | None) -> bytes:
        token = b"%b: %b\r\n" % (HEADER_TOKEN.encode(), self._tokens.mint(place.sandbox))
        archive = "&archive=tar" if place.path.endswith("/") else ""
        target = f"{file_query(place.path)}{archive}".encode("ascii")
        lines = lines if archive or method == "PUT" else b""
        return framing.request_head(method.encode(), place.endpoint.authority, length, token, lines, target=target)

    def _touch(self) -> None:
        self._moved_at = asyncio.get_running_loop().time()
