"""The hive's door to the files of one sandbox: bytes as they are, of any length, without MCP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar

import anyio

from ash_mcp._answers import Fields, runner_fields
from ash_mcp._connection import Connection
from ash_mcp._protocol import as_object, parse_message
from ash_mcp._reading import read_body
from ash_mcp._retry import call_again
from ash_mcp._verdict import Head, error_of_status, misbehaviour
from ash_mcp.errors import AshError, RemoteProtocolError
from ash_mcp.types import SandboxId
from ash_mcp.wire import file_target

if TYPE_CHECKING:
    import httpx

__all__ = ["FileDoor", "OnBytes"]

QUIET_SECONDS: Final = 150.0
"""How long nothing may come or go; the hive gives up before that, and says why."""
_MAX_SAID_BYTES: Final = 64 * 1024
_TAR: Final = "archive=tar"

OnBytes = Callable[[int, int | None], object]
"""Called after each piece with the bytes done and the total; None where that is not known."""

T = TypeVar("T")


class FileDoor:
    """The door to one sandbox's files.

    Args:
        require_open: Raises where the sandbox's handle is closed.
    """

    def __init__(self, connection: Connection, sandbox: SandboxId, require_open: Callable[[], None]) -> None:
        self._connection = connection
        self._sandbox = sandbox
        self._require_open = require_open

    async def put(
        self, path: str, pieces: Callable[[], AsyncGenerator[bytes, None]], *, mode: int | None = None
    ) -> Fields:
        """Write a file, or with a path that ends with a slash unpack an archive into a folder.

        Args:
            pieces: Gives the bytes, from the start each time: one that broke off is tried again.

        Raises:
            AshError: It was refused or broke off, and nothing was changed.
        """
        query = _TAR if path.endswith("/") else "" if mode is None else f"mode={mode & 0o777:03o}"

        async def attempt() -> Fields:
            async with (
                contextlib.aclosing(pieces()) as content,
                self._exchange("PUT", path, query, content=content, headers={}) as (head, response),
            ):
                message = parse_message(await read_body(response, head, max_bytes=_MAX_SAID_BYTES))
                if message is None:
                    raise misbehaviour(head, "answered without JSON")
                return Fields(message)

        return await self.again(attempt)

    async def again(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Do `attempt`, and again where its connection fails: what it does may be repeated."""
        deadline = anyio.current_time() + self._connection.settings.timeout_seconds
        return await call_again(
            attempt,
            remaining_seconds=lambda: deadline - anyio.current_time(),
            repeatable=True,
            on_wait=lambda error, delay: None,
        )

    @contextlib.asynccontextmanager
    async def get(self, path: str) -> AsyncGenerator[tuple[AsyncIterator[bytes], int | None], None]:
        """Yield the bytes of a file and how many there are, or with a path that ends with a slash a folder's archive.

        Raises:
            AshError: There is none, or it broke off.
        """
        query = _TAR if path.endswith("/") else ""
        async with self._exchange("GET", path, query, headers={"accept-encoding": "identity"}) as (_, response):
            size = response.headers.get("content-length")
            yield response.aiter_bytes(), int(size) if size is not None and size.isdigit() else None

    @contextlib.asynccontextmanager
    async def _exchange(
        self,
        method: str,
        path: str,
        query: str,
        *,
        headers: Mapping[str, str],
        content: AsyncIterator[bytes] | None = None,
    ) -> AsyncGenerator[tuple[Head, httpx.Response], None]:
        self._require_open()
        target = file_target(self._sandbox, path)
        if query:
            target += f"{'&' if '?' in target else '?'}{query}"
        async with self._connection.stream(
            method, target, content=content, headers=headers, quiet_seconds=QUIET_SECONDS
        ) as response:
            head = Head.of(response.status_code, response.headers)
            if head.status not in (200, 201) or not head.from_sandbox:
                raise await _refused(head, response)
            yield head, response


async def _refused(head: Head, response: httpx.Response) -> AshError:
    body = parse_message(await read_body(response, head, max_bytes=_MAX_SAID_BYTES)) or {}
    if head.from_sandbox and as_object(body.get("error")) is not None:
        try:
            runner_fields({"isError": True, "structuredContent": body})
        except AshError as error:
            return error
    return error_of_status(head, body) or RemoteProtocolError(f"the hive answered {head.status} to a file")
