"""The hub's own requests to a sandbox's runner: is it ready, which tools has it, here are your secrets, read this."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ash_hub.spawning.sandbox_requests import MAX_ANSWER_BYTES, SandboxRequests, error_text
from ash_mcp.errors import NotFound, RemoteProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_mcp.wire import CLAIM_PATH, HEADER_TOKEN, HEALTH_PATH, MCP_PATH, MODERN_VERSION, file_query
from ash_router.http import framing
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.pool import Answer
from ash_router.upstream.proof import seal

__all__ = ["RunnerClient"]


class RunnerClient(SandboxRequests):
    """Speaks to one sandbox's runner. Cheap to make; holds no connection between requests."""

    def __init__(self, endpoint: Endpoint, tokens: CallTokens, sandbox_id: SandboxId) -> None:
        super().__init__(endpoint, tokens.sandbox_keys, sandbox_id)
        self._tokens = tokens

    async def wait_ready(self, timeout_seconds: float) -> None:
        async def ask_health(left: float) -> tuple[int, bytes]:
            return await self._asked("GET", HEALTH_PATH, timeout_seconds=left)

        status, body = await self._first_answer(ask_health, timeout_seconds)
        if status != 200:
            raise RemoteProtocolError(error_text(body, f"the runner's health check answered {status}"))

    async def claim(self, env: Mapping[str, str], secrets: Mapping[str, str], timeout_seconds: float) -> None:
        """Hand over what the caller gave for this sandbox alone; once. On TCP nobody else can read it."""
        body = json.dumps({"env": dict(env), "secrets": dict(secrets)}).encode()
        if self._endpoint.unix is None:
            body = seal(self._keys, self._id, body)
        status, answer = await self._asked("POST", CLAIM_PATH, body=body, timeout_seconds=timeout_seconds)
        if status != 200:
            raise RemoteProtocolError(error_text(answer, f"the runner refused the claim with {status}"))

    async def read_file(self, path: str, max_bytes: int, timeout_seconds: float) -> bytes:
        """Return a file's bytes.

        Raises:
            NotFound: There is no such file, or it may not be read; the message is the runner's.
            RemoteProtocolError: It is larger than `max_bytes`.
        """
        status, body = await self._asked("GET", file_query(path), timeout_seconds=timeout_seconds, max_bytes=max_bytes)
        if status != 200:
            raise NotFound(error_text(body, f"{path} could not be read"), path=path)
        return body

    async def stat_file(self, path: str, timeout_seconds: float) -> tuple[int | None, str]:
        """Return the size in bytes of a file that can be read, and its media type; of a folder no size.

        Raises:
            NotFound: There is none; the message is the runner's.
        """
        target = file_query(path) + ("&archive=tar" if path.endswith("/") else "")
        answer = await self._answer("HEAD", target, timeout_seconds=timeout_seconds)
        if answer.status != 200:
            # a HEAD says not why, so it is asked again
            _, said = await self._asked("GET", target, timeout_seconds=timeout_seconds, headers={"range": "bytes=0-0"})
            raise NotFound(error_text(said, f"{path} could not be read"), path=path)
        kind = framing.one(answer.headers, b"content-type") or b""
        return framing.content_length(answer.headers), kind.decode("latin-1")

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
        return await self._asked(
            "POST", MCP_PATH, body=body, headers=headers, timeout_seconds=timeout_seconds, max_bytes=max_bytes
        )

    async def _asked(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> tuple[int, bytes]:
        answer = await self._answer(method, target, headers=headers, **more)
        return answer.status, bytes(answer.body)

    async def _answer(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> Answer:
        token = {HEADER_TOKEN: self._tokens.mint(self._id).decode()}
        return await self._request(method, target, headers={**token, **(headers or {})}, **more)
