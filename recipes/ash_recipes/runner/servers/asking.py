"""What a recipe's server asks of its caller, where all callers share one connection to it: whose question it is.

Over that connection a question (elicitation, sampling, roots) carries no sign of the call that it belongs to. It is
taken for a call's that does not wait for an answer already, if there is one. Where calls of several callers do not,
nobody is asked, since the wrong one might answer. Calls of one session are one caller's.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import mcp_types as types
from mcp.client.session import ClientRequestContext
from mcp.server.context import ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp.shared.message import ServerMessageMetadata
from mcp_types import INVALID_REQUEST

__all__ = ["Answer", "Call", "Calls", "Ctx", "SessionCall", "refused"]

Ctx = ServerRequestContext[Any, Any]
Answer = types.InputResponse | types.ErrorData

_SESSION_HEADER: Final = "mcp-session-id"
_NEEDED: Final[dict[type[types.InputRequest], tuple[str, types.ClientCapabilities]]] = {
    types.ElicitRequest: ("elicitation", types.ClientCapabilities(elicitation=types.ElicitationCapability())),
    types.CreateMessageRequest: ("sampling", types.ClientCapabilities(sampling=types.SamplingCapability())),
    types.ListRootsRequest: ("roots", types.ClientCapabilities(roots=types.RootsCapability())),
}


class Call(Protocol):
    """A call that is open, with the way back to its caller."""

    @property
    def ctx(self) -> Ctx:
        """The request that the call came with, the newest if there were several."""
        ...

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        """Tell the caller a log message; nothing where it did not ask for any."""
        ...

    async def ask(self, request: types.InputRequest) -> Answer:
        """Put a question to the caller and wait for what it says."""
        ...


class SessionCall:
    """A call that is one request: its caller hears of everything on that request's own stream."""

    def __init__(self, ctx: Ctx) -> None:
        self.ctx = ctx

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        await self.ctx.session.send_log_message(  # pyright: ignore[reportDeprecated]
            params.level, params.data, params.logger, related_request_id=self.ctx.request_id
        )

    async def ask(self, request: types.InputRequest) -> Answer:
        beside = ServerMessageMetadata(related_request_id=self.ctx.request_id)
        try:
            return await self.ctx.session.send_request(request, _result_of(request), metadata=beside)
        except MCPError as exc:
            return exc.error


class Calls:
    """The calls that are open now."""

    def __init__(self) -> None:
        self._open: dict[Call, int] = {}  # how many questions of each are unanswered, in the order in which they came

    @contextmanager
    def open(self, call: Call) -> Generator[None]:
        """Have `call` among the open ones while the context is entered."""
        self._open[call] = 0
        try:
            yield
        finally:
            self._open.pop(call, None)

    async def logged(self, params: types.LoggingMessageNotificationParams) -> None:
        """Pass a log message of the server on to every open call."""
        for call in list(self._open):
            await call.log(params)

    async def elicit(self, context: ClientRequestContext, params: types.ElicitRequestParams) -> Any:
        """Answer an `elicitation/create` of the server."""
        del context
        return await self._ask(types.ElicitRequest(params=params))

    async def sample(self, context: ClientRequestContext, params: types.CreateMessageRequestParams) -> Any:
        """Answer a `sampling/createMessage` of the server."""
        del context
        return await self._ask(types.CreateMessageRequest(params=params))

    async def list_roots(self, context: ClientRequestContext) -> Any:
        """Answer a `roots/list` of the server."""
        del context
        return await self._ask(types.ListRootsRequest())

    async def _ask(self, request: types.InputRequest) -> Answer:
        what, needed = _NEEDED[type(request)]
        asking = [call for call, unanswered in self._open.items() if not unanswered] or list(self._open)
        callers = {_caller(call) for call in asking}
        if not callers:
            return refused(f"no call is open: there is nobody to ask for {what}")
        if len(callers) > 1:
            return refused(f"several callers have calls open, and nothing says which of them to ask for {what}")
        call = asking[-1]
        if not call.ctx.session.check_client_capability(needed):
            return refused(f"the caller does not support {what}")
        self._open[call] += 1
        try:
            return await call.ask(request)
        finally:
            if call in self._open:
                self._open[call] -= 1


def _caller(call: Call) -> object:
    request = call.ctx.request
    session = request.headers.get(_SESSION_HEADER) if request is not None else None
    return session if session is not None else call


def refused(why: str) -> types.ErrorData:
    """Return the answer of a caller that is not asked, or does not answer."""
    return types.ErrorData(code=INVALID_REQUEST, message=why)


def _result_of(request: types.InputRequest) -> type[types.InputResponse]:
    if isinstance(request, types.ElicitRequest):
        return types.ElicitResult
    if isinstance(request, types.ListRootsRequest):
        return types.ListRootsResult
    return types.CreateMessageResult if request.params.tools is None else types.CreateMessageResultWithTools
