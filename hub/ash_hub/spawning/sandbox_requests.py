"""The hub's own requests to a sandbox, within bounds.

The other end may be hostile: redirects are not followed, answers are bounded in size and time, and what comes back
is data. Calls of callers do not pass here; those are the relay's.
"""

from __future__ import annotations

import errno
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread

from ash_hub.spawning.toolsets import mapping
from ash_mcp.errors import AshTimeout, ConnectFailed, RemoteProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_router.bounds.limits import DEFAULT_LIMITS
from ash_router.upstream.connection import Connection
from ash_router.upstream.pool import Answer, open_connection
from ash_router.upstream.proof import SandboxKeys

__all__ = [
    "MAX_ANSWER_BYTES",
    "MAX_LIST_BYTES",
    "MAX_LIST_VALUES",
    "SandboxRequests",
    "error_text",
    "last_event",
    "within",
]

MAX_ANSWER_BYTES: Final = 24 * 1024 * 1024
MAX_ANSWER_VALUES: Final = 1_000_000
"""A value of JSON takes about a hundred bytes of memory, however few of the answer it takes."""
MAX_LIST_BYTES: Final = 2 * 1024 * 1024
"""Twice what is shown of a list."""
MAX_LIST_VALUES: Final = 65_536
MAX_LIST_PAGES: Final = 64
MAX_DIGITS: Final = 64
_CONNECT_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 0.02
"""Until a refused connection is tried again; a refusal costs 0.1 ms of processor time."""
_LEAST_SECONDS: Final = 0.1
"""With less time left it is not tried again."""
_UNHEARD: Final = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""What the kernel says of an address from which nothing comes, not even a refusal."""
T = TypeVar("T")


class SandboxRequests(ABC):
    """Speaks to one sandbox. Cheap to make; holds no connection between requests."""

    def __init__(self, endpoint: Endpoint, keys: SandboxKeys, sandbox_id: SandboxId) -> None:
        self._endpoint = endpoint.of(sandbox_id)
        self._keys = keys
        self._id = sandbox_id

    async def list_tools(self, timeout_seconds: float) -> list[Any]:
        """Return every entry of its `tools/list`, unchecked. Its pages share one time and one size."""
        tools: list[Any] = []
        params: dict[str, Any] = {}
        left, values_left = MAX_LIST_BYTES, MAX_LIST_VALUES
        with within(timeout_seconds, "tools/list"):
            for _ in range(MAX_LIST_PAGES):
                status, answer = await self._ask("tools/list", params, timeout_seconds, max_bytes=left)
                left -= len(answer)
                values_left -= _values(answer)
                if values_left < 0:
                    raise RemoteProtocolError(f"the sandbox's tools/list holds more than {MAX_LIST_VALUES} values")
                result = await anyio.to_thread.run_sync(_result, "tools/list", status, answer)
                page = result.get("tools")
                if not isinstance(page, list):
                    raise RemoteProtocolError("the sandbox's tools/list holds no list of tools")
                tools += cast("list[Any]", page)
                cursor = result.get("nextCursor")
                if not isinstance(cursor, str):
                    return tools
                params = {"cursor": cursor}
        raise RemoteProtocolError(f"the sandbox's tools/list did not end within {MAX_LIST_PAGES} pages")

    async def read_resource(self, uri: str, timeout_seconds: float) -> list[Any]:
        """Return the contents of one of the sandbox's own resources, as MCP has them."""
        status, answer = await self._ask("resources/read", {"uri": uri}, timeout_seconds, name=uri)
        result = await anyio.to_thread.run_sync(_result, "resources/read", status, answer)
        contents = result.get("contents")
        if not isinstance(contents, list):
            raise RemoteProtocolError("the sandbox's resources/read holds no contents")
        return cast("list[Any]", contents)

    @abstractmethod
    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return when its MCP server answers.

        On TCP nobody may listen yet although the pod runs, so it is tried again until the time is over.

        Raises:
            RemoteProtocolError: It says why its server could not be started, or answers something else.
            AshTimeout: It did not answer in time.
            ConnectFailed: Nobody listens; or this machine has not once heard from that address, as the message says.
        """

    @abstractmethod
    async def _ask(
        self,
        method: str,
        params: Mapping[str, Any],
        timeout_seconds: float,
        *,
        name: str | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        """Return status and body of the answer to one request of MCP.

        Args:
            name: What it is about, such as the URI of a resource.
        """

    async def _first_answer(self, attempt: Callable[[float], Awaitable[T]], timeout_seconds: float) -> T:
        """Return what the first attempt returns that reaches somebody; each is given the seconds that are left."""
        gives_up_at = anyio.current_time() + timeout_seconds
        left, is_heard = timeout_seconds, False
        while True:
            try:
                return await attempt(left)
            except ConnectFailed as error:
                number = getattr(error.__cause__, "errno", None)
                if self._endpoint.unix is not None or number is None:
                    raise  # somebody listens, and is not who should
                failed, is_heard = error, is_heard or number not in _UNHEARD
            await anyio.sleep(_AGAIN_SECONDS)
            left = gives_up_at - anyio.current_time()
            if left <= _LEAST_SECONDS and is_heard:
                raise failed
            if left <= _LEAST_SECONDS:
                raise self._out_of_reach() from failed

    def _out_of_reach(self) -> ConnectFailed:
        return ConnectFailed(
            f"it runs at {self._endpoint.host}, but this machine cannot reach that address: run the hive where it "
            "can, which for pods is in their cluster (helm/ash) or on one of its nodes"
        )

    async def _request(
        self,
        method: str,
        target: str,
        *,
        timeout_seconds: float,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Answer:
        """Send one request on a connection of its own and return the whole answer.

        Raises:
            AshTimeout: It took longer.
            ConnectFailed: Nobody listens there, or not who should.
            StreamBroken, RemoteProtocolError: The answer broke off, is none, or is too long.
        """
        all_headers = {
            "host": self._endpoint.authority,
            "connection": "close",
            "content-length": str(len(body)),
            "accept": "application/json, text/event-stream",
            "content-type": "application/json",
            **(headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
        answer = Answer(max_bytes)
        with within(timeout_seconds, target.partition("?")[0]):
            # Less than the whole: if it is over, it is known that there was no connection.
            patience = min(_CONNECT_SECONDS, timeout_seconds / 2)
            connection = await open_connection(self._endpoint, self._connection, self._keys, timeout_seconds=patience)
            try:
                connection.send(
                    f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + body, answer, is_head=method == "HEAD"
                )
                await answer.done.wait()
            finally:
                connection.close()
        if answer.error is not None:
            raise answer.error
        return answer

    def _connection(self) -> Connection:
        return Connection(
            self._endpoint,
            _let_go,
            max_head_bytes=DEFAULT_LIMITS.max_head_bytes,
            max_headers=DEFAULT_LIMITS.max_headers,
        )


def _let_go(connection: Connection, reusable: bool) -> None:
    del connection, reusable  # whoever asked closes it


@contextmanager
def within(seconds: float, target: str) -> Generator[None]:
    """Bound a whole answer.

    Raises:
        AshTimeout: It took longer.
    """
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise AshTimeout(f"the sandbox did not answer {target} in {seconds:g} s")


def _result(method: str, status: int, answer: bytes) -> Mapping[str, Any]:
    """Return the result that an answer holds.

    Raises:
        RemoteProtocolError: It holds none, or more than there may be.
    """
    if _values(answer) > MAX_ANSWER_VALUES:
        raise RemoteProtocolError(f"the sandbox's {method} holds more than {MAX_ANSWER_VALUES} values")
    try:
        message = json.loads(last_event(answer), parse_int=_integer, parse_float=_float)
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(f"the sandbox answered {method} with {status} and no JSON") from exc
    result = mapping(mapping(message).get("result"))
    if not result:
        raise RemoteProtocolError(error_text(last_event(answer), f"the sandbox refused {method} with {status}"))
    return result


def _values(answer: bytes) -> int:
    """Return how many values of JSON an answer has at most."""
    return sum(answer.count(mark) for mark in (b"{", b"[", b","))


def _integer(digits: str) -> int | float:
    """Return a number; one so long that reading its digits would take time is a float, as for most other readers."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _float(digits: str) -> float:
    """Return a number. Unlike `float` itself it lets the loop's thread have its turn between two."""
    return float(digits)


def last_event(answer: bytes) -> bytes:
    """Return a JSON answer as it is, or the data of the last event of a stream."""
    if answer.lstrip()[:1] == b"{":
        return answer
    _, found, rest = (b"\n" + answer).rpartition(b"\ndata:")
    return rest.partition(b"\n")[0] if found else b""


def error_text(body: bytes, fallback: str) -> str:
    try:
        error = mapping(json.loads(body)).get("error")
    except (ValueError, RecursionError):
        return fallback
    text = mapping(error).get("message", error)
    return f"{fallback}: {str(text)[:2000]}" if text else fallback
