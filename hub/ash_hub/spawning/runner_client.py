"""The hub's own requests to a sandbox's runner: is it ready, which tools has it, here are your secrets, read this.

The other end may be hostile: redirects are not followed, answers are bounded in size and time, and what comes back
is data. Calls of callers do not pass here; those are the relay's.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast
from urllib.parse import quote

import anyio
import anyio.to_thread

from ash_hub.spawning.toolsets import mapping
from ash_mcp.errors import AshTimeout, ConnectFailed, NotFound, RemoteProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_mcp.wire import CLAIM_PATH, FILES_PATH, HEADER_TOKEN, HEALTH_PATH, MCP_PATH, MODERN_VERSION
from ash_router.bounds.limits import DEFAULT_LIMITS
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.connection import Connection
from ash_router.upstream.pool import Answer, open_connection
from ash_router.upstream.proof import seal

__all__ = ["RunnerClient"]

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


class RunnerClient:
    """Speaks to one sandbox's runner. Cheap to make; holds no connection between requests."""

    def __init__(self, endpoint: Endpoint, tokens: CallTokens, sandbox_id: SandboxId) -> None:
        self._endpoint = endpoint.of(sandbox_id)
        self._tokens = tokens
        self._id = sandbox_id

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return when the runner says that the recipe's server answers.

        On TCP nobody may listen yet although the pod runs, so it is tried again until the time is over.

        Raises:
            RemoteProtocolError: It says why its server could not be started.
            AshTimeout: It did not answer in time.
            ConnectFailed: Nobody listens; or this machine has not once heard from that address, as the message says.
        """
        status, body = await self._first_answer(timeout_seconds)
        if status != 200:
            raise RemoteProtocolError(_error_text(body, f"the runner's health check answered {status}"))

    async def _first_answer(self, timeout_seconds: float) -> tuple[int, bytes]:
        gives_up_at = anyio.current_time() + timeout_seconds
        left, is_heard = timeout_seconds, False
        while True:
            try:
                return await self._request("GET", HEALTH_PATH, timeout_seconds=left)
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

    async def claim(self, env: Mapping[str, str], secrets: Mapping[str, str], timeout_seconds: float) -> None:
        """Hand over what the caller gave for this sandbox alone; once. On TCP nobody else can read it."""
        body = json.dumps({"env": dict(env), "secrets": dict(secrets)}).encode()
        if self._endpoint.unix is None:
            body = seal(self._tokens.sandbox_keys, self._id, body)
        status, answer = await self._request("POST", CLAIM_PATH, body=body, timeout_seconds=timeout_seconds)
        if status != 200:
            raise RemoteProtocolError(_error_text(answer, f"the runner refused the claim with {status}"))

    async def list_tools(self, timeout_seconds: float) -> list[Any]:
        """Return every entry of the runner's `tools/list`, unchecked. Its pages share one time and one size."""
        tools: list[Any] = []
        params: dict[str, Any] = {}
        left, values_left = MAX_LIST_BYTES, MAX_LIST_VALUES
        with _within(timeout_seconds, "tools/list"):
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

    async def read_file(self, path: str, max_bytes: int, timeout_seconds: float) -> bytes:
        """Return a file's bytes.

        Raises:
            NotFound: There is no such file, or it may not be read; the message is the runner's.
            RemoteProtocolError: It is larger than `max_bytes`.
        """
        target = f"{FILES_PATH}?path={quote(path, safe='')}"
        status, body = await self._request("GET", target, timeout_seconds=timeout_seconds, max_bytes=max_bytes)
        if status != 200:
            raise NotFound(_error_text(body, f"{path} could not be read"), path=path)
        return body

    async def _ask(
        self,
        method: str,
        params: Mapping[str, Any],
        timeout_seconds: float,
        *,
        name: str | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        meta = {
            "io.modelcontextprotocol/protocolVersion": MODERN_VERSION,
            "io.modelcontextprotocol/clientInfo": {"name": "ash-hub", "version": "0"},
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": {**params, "_meta": meta}}).encode()
        headers = {"mcp-protocol-version": MODERN_VERSION, "mcp-method": method}
        if name is not None:
            headers["mcp-name"] = name
        return await self._request(
            "POST", MCP_PATH, body=body, headers=headers, timeout_seconds=timeout_seconds, max_bytes=max_bytes
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
    ) -> tuple[int, bytes]:
        all_headers = {
            "host": self._endpoint.authority,
            "connection": "close",
            "content-length": str(len(body)),
            HEADER_TOKEN: self._tokens.mint(self._id).decode(),
            "accept": "application/json, text/event-stream",
            "content-type": "application/json",
            **(headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
        answer = Answer(max_bytes)
        with _within(timeout_seconds, target.partition("?")[0]):
            # Less than the whole: if it is over, it is known that there was no connection.
            patience = min(_CONNECT_SECONDS, timeout_seconds / 2)
            connection = await open_connection(
                self._endpoint, self._connection, self._tokens.sandbox_keys, timeout_seconds=patience
            )
            try:
                connection.send(f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + body, answer)
                await answer.done.wait()
            finally:
                connection.close()
        if answer.error is not None:
            raise answer.error
        return answer.status, bytes(answer.body)

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
def _within(seconds: float, target: str) -> Generator[None]:
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
        message = json.loads(_last_event(answer), parse_int=_integer, parse_float=_float)
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(f"the sandbox answered {method} with {status} and no JSON") from exc
    result = mapping(mapping(message).get("result"))
    if not result:
        raise RemoteProtocolError(_error_text(answer, f"the sandbox refused {method} with {status}"))
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


def _last_event(answer: bytes) -> bytes:
    """Return a JSON answer as it is, or the data of the last event of a stream."""
    if answer.lstrip()[:1] == b"{":
        return answer
    _, found, rest = (b"\n" + answer).rpartition(b"\ndata:")
    return rest.partition(b"\n")[0] if found else b""


def _error_text(body: bytes, fallback: str) -> str:
    try:
        error = mapping(json.loads(body)).get("error")
    except (ValueError, RecursionError):
        return fallback
    text = mapping(error).get("message", error)
    return f"{fallback}: {str(text)[:2000]}" if text else fallback
