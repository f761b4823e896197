"""The hub's own requests to a sandbox's runner: is it ready, which tools has it, here are your secrets, read this.

The other end may be hostile: redirects are not followed, answers are bounded in size and time, and what comes back
is data. Calls of callers do not pass here; those are the relay's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, cast
from urllib.parse import quote

import anyio
import httpx

from ash_hub.tools import mapping
from ash_mcp.errors import AshTimeout, ConnectFailed, NotFound, RemoteProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_mcp.wire import CLAIM_PATH, FILES_PATH, HEADER_TOKEN, HEALTH_PATH, MCP_PATH, MODERN_VERSION
from ash_router.tokens import CallTokens

__all__ = ["RunnerClient"]

MAX_ANSWER_BYTES: Final = 24 * 1024 * 1024
"""Room for 256 tools with schemas of 64 KiB each."""
MAX_ANSWER_VALUES: Final = 1_000_000
"""A value of JSON takes about a hundred bytes of memory, however few of the answer it takes."""
MAX_LIST_PAGES: Final = 64


class RunnerClient:
    """Speaks to one sandbox's runner. Cheap to make; holds no connection between requests."""

    def __init__(self, endpoint: Endpoint, tokens: CallTokens, sandbox_id: SandboxId, generation: int) -> None:
        self._endpoint = endpoint
        self._tokens = tokens
        self._id = sandbox_id
        self._generation = generation

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return when the runner says that the recipe's server answers.

        Raises:
            RemoteProtocolError: It says why its server could not be started.
            AshTimeout: It did not answer in time.
            ConnectFailed: Nobody listens.
        """
        status, body = await self._request("GET", HEALTH_PATH, timeout_seconds=timeout_seconds)
        if status != 200:
            raise RemoteProtocolError(_error_text(body, f"the runner's health check answered {status}"))

    async def claim(self, env: Mapping[str, str], secrets: Mapping[str, str], timeout_seconds: float) -> None:
        """Hand over what the caller gave for this sandbox alone; once."""
        body = json.dumps({"env": dict(env), "secrets": dict(secrets)}).encode()
        status, answer = await self._request("POST", CLAIM_PATH, body=body, timeout_seconds=timeout_seconds)
        if status != 200:
            raise RemoteProtocolError(_error_text(answer, f"the runner refused the claim with {status}"))

    async def list_tools(self, timeout_seconds: float) -> list[Any]:
        """Return every entry of the runner's `tools/list`, unchecked. Its pages share one time and one size."""
        tools: list[Any] = []
        params: dict[str, Any] = {}
        left = MAX_ANSWER_BYTES
        with _within(timeout_seconds, "tools/list"):
            for _ in range(MAX_LIST_PAGES):
                status, answer = await self._ask("tools/list", params, timeout_seconds, max_bytes=left)
                left -= len(answer)
                result = _result("tools/list", status, answer)
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
        contents = _result("resources/read", status, answer).get("contents")
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
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> tuple[int, bytes]:
        all_headers = {
            HEADER_TOKEN: self._tokens.mint(self._id, self._generation).decode(),
            "accept": "application/json, text/event-stream",
            "content-type": "application/json",
            **(headers or {}),
        }
        path = target.partition("?")[0]
        try:
            with _within(timeout_seconds, path):
                async with (
                    self._client(timeout_seconds) as client,
                    client.stream(method, target, content=body, headers=all_headers) as response,
                ):
                    received = bytearray()
                    async for chunk in response.aiter_raw():
                        received += chunk
                        if len(received) > max_bytes:
                            raise RemoteProtocolError(
                                f"the sandbox's answer is larger than {max_bytes} bytes", limit=max_bytes
                            )
                    return response.status_code, bytes(received)
        except httpx.TimeoutException as exc:
            raise AshTimeout(f"the sandbox did not answer {path} in {timeout_seconds:g} s") from exc
        except httpx.ConnectError as exc:
            raise ConnectFailed("nothing listens at the sandbox's endpoint") from exc
        except httpx.HTTPError as exc:
            raise RemoteProtocolError(f"the sandbox broke off: {type(exc).__name__}") from exc

    @asynccontextmanager
    async def _client(self, timeout_seconds: float) -> AsyncGenerator[httpx.AsyncClient]:
        where = self._endpoint
        # verify=False spares the loading of certificates: connections are plain, on a Unix socket or in a cluster.
        transport = httpx.AsyncHTTPTransport(uds=where.unix, verify=False, retries=0)
        base = "http://sandbox" if where.unix is not None else f"http://{where.host}:{where.port}"
        timeout = httpx.Timeout(timeout_seconds, connect=min(5.0, timeout_seconds))
        async with httpx.AsyncClient(
            transport=transport, base_url=base, timeout=timeout, follow_redirects=False, trust_env=False
        ) as client:
            yield client


@contextmanager
def _within(seconds: float, target: str) -> Generator[None]:
    """Bound a whole answer: httpx bounds only the time to its next byte.

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
    if sum(answer.count(mark) for mark in (b"{", b"[", b",")) > MAX_ANSWER_VALUES:
        raise RemoteProtocolError(f"the sandbox's {method} holds more than {MAX_ANSWER_VALUES} values")
    try:
        message = json.loads(_last_event(answer))
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(f"the sandbox answered {method} with {status} and no JSON") from exc
    result = mapping(mapping(message).get("result"))
    if not result:
        raise RemoteProtocolError(_error_text(answer, f"the sandbox refused {method} with {status}"))
    return result


def _last_event(answer: bytes) -> bytes:
    """Return a JSON answer as it is, or the data of the last event of a stream."""
    if answer.lstrip()[:1] == b"{":
        return answer
    data = [line.partition(b":")[2] for line in answer.splitlines() if line.startswith(b"data:")]
    return data[-1] if data else b""


def _error_text(body: bytes, fallback: str) -> str:
    try:
        error = mapping(json.loads(body)).get("error")
    except (ValueError, RecursionError):
        return fallback
    text = mapping(error).get("message", error)
    return f"{fallback}: {str(text)[:2000]}" if text else fallback
