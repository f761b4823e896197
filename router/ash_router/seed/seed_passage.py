"""One request to a server of the seed's, and its answer: both pass as they come, with the headers that they have.

The server is not ours and proves nothing. It is sent no token, and what it says of a hive (`ash-…`) does not pass.
"""

from __future__ import annotations

from typing import Final

from ash_mcp.errors import AshError, AshTimeout, CapacityExceeded
from ash_mcp.types import SandboxId
from ash_mcp.wire import HEADER_SEED_ROUTER, MCP_PATH
from ash_router.calls.direct import DirectRequest
from ash_router.calls.door import Door, HeaderPolicy
from ash_router.calls.passage import Passage, Sender
from ash_router.calls.sandbox_exchange import Services
from ash_router.calls.sandbox_response import PassedReply
from ash_router.http import framing, responses
from ash_router.http.framing import Headers, ResponseHead
from ash_router.http.heads import RequestHead
from ash_router.http.responses import Caller

__all__ = ["SEED_DOOR", "SeedPassage", "forwarded_lines", "rest_of", "text_refusal"]

_FORWARDED: Final = frozenset({b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"})
_MARK: Final = b"%b: 1\r\nconnection: close\r\n" % HEADER_SEED_ROUTER.encode()

SEED_DOOR: Final = Door(MCP_PATH.encode(), None, HeaderPolicy(_FORWARDED, frozenset(), is_denylist=True))
"""A server of the seed's: whatever is below `/mcp`, and nearly all headers."""


class SeedPassage(Passage):
    """A request to a sandbox that the seed's control plane made.

    Args:
        answer_seconds: How long it may take until the answer begins.
    """

    def __init__(
        self,
        sender: Sender,
        direct: DirectRequest,
        head: RequestHead,
        forwarded: bytes,
        services: Services,
        *,
        answer_seconds: float,
        paused: bool = False,
    ) -> None:
        super().__init__(sender, direct, head, forwarded, services, paused=paused)
        self._reply = _PlainReply(sender, headers=direct.door.headers, is_head=direct.method == "HEAD")
        self._answer_seconds = answer_seconds

    def _count(self, sandbox_id: SandboxId | None) -> bool:
        del sandbox_id  # who made it looks after its idle time
        return super()._count(None)

    def _token_line(self) -> bytes:
        return _MARK

    def _may_tell(self) -> bool:
        return False  # what a server of the seed's says passes as it is

    def _silence_seconds(self) -> float:
        return super()._silence_seconds() if self.begun else self._answer_seconds

    async def _fail_explained(self, error: AshError, status: int | None = None) -> None:
        self.fail(error, status)

    def _whole_failure(self, error: AshError, status: int | None) -> bytes:
        words, status = "bad gateway", 504 if status == 504 or isinstance(error, AshTimeout) else 502
        if isinstance(error, CapacityExceeded):
            words, status = error.message, 429
        elif status == 504:
            words = "gateway timeout"
        return text_refusal(self._sender, words, error, status, self._direct.method)


class _PlainReply(PassedReply):
    """An answer that passes as it is, without a word of who gave it."""

    def _said(self, head: ResponseHead) -> tuple[bytes, bytes]:
        return self._headers.response_lines(head), b""


def text_refusal(caller: Caller, words: str, error: AshError, status: int, method: str) -> bytes:
    """Return the whole answer that refuses a request as the seed did: to a `HEAD` without its body."""
    answer = responses.text_refusal(caller, words, error, status)
    return responses.without_body(answer) if method == "HEAD" else answer


def rest_of(target: bytes) -> bytes:
    """Return what of a caller's target is asked for below the door's, whether the caller's is there already or not."""
    if target.startswith(SEED_DOOR.target):
        return target.removeprefix(SEED_DOOR.target)
    path, mark, query = target.partition(b"?")
    return (b"" if path == b"/" else path) + mark + query


def forwarded_lines(headers: Headers, client: str, scheme: str) -> bytes:
    """Return the `x-forwarded-…` lines: the caller's address behind those that the request came with."""
    hops = [value for name, value in headers if name == b"x-forwarded-for"]
    told = [(b"x-forwarded-for", b", ".join([*hops, client.encode()])), (b"x-forwarded-proto", scheme.encode())]
    host = framing.one(headers, b"host")
    return framing.lines_of([*told, (b"x-forwarded-host", host)] if host is not None else told)
