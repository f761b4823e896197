"""Calls of stateless callers to a server that asks as the handshake era does.

Such a caller cannot be asked in the middle of a request. So the call goes on here while its request is answered with
the question (`input_required`); the caller makes the request again with its answer and the `requestState` that came
with the question, and so takes up the call where it stopped. A state is good once, for the same request, and for as
long as the call waits for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import anyio
import mcp_types as types
from anyio.abc import TaskGroup
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS
from pydantic import BaseModel

from ash_recipes.runner.servers.asking import Answer, Ctx, SessionCall, refused

__all__ = ["MAX_QUESTIONS", "MAX_SUSPENDED", "TurnCall", "Turns"]

MAX_SUSPENDED: Final = 64
"""Calls that wait for their callers' answers; the longest waiting is ended over it."""
MAX_QUESTIONS: Final = 16
"""Questions of one call that are open at once."""
ANSWER_SECONDS: Final = 600.0
"""How long a question waits for its answer."""

Work = Callable[["TurnCall"], Awaitable[BaseModel]]


@dataclass(slots=True, eq=False)
class _Question:
    request: types.InputRequest
    answer: Answer | None = None
    answered: anyio.Event = field(default_factory=anyio.Event)


class TurnCall:
    """A call that may take several requests; between them its caller hears of nothing."""

    def __init__(self, ctx: Ctx, params: types.InputResponseRequestParams) -> None:
        self.ctx = ctx
        self._same = _identity(ctx, params)
        self._here = False
        self._questions: dict[str, _Question] = {}
        self._asked = 0
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()
        self._ended = False
        self._outcome: BaseModel | Exception | None = None

    async def run(self, work: Work) -> None:
        """Do the work that the call is, whoever waits for it."""
        try:
            with self._scope:
                self._outcome = await work(self)
        except Exception as exc:
            self._outcome = exc
        finally:
            self._ended = True
            self._changed.set()

    def end(self) -> None:
        """Cancel the work."""
        self._scope.cancel()

    def is_for(self, ctx: Ctx, params: types.InputResponseRequestParams) -> bool:
        """Whether a request is this call's own, made again."""
        return self._same == _identity(ctx, params)

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        if self._here:
            await SessionCall(self.ctx).log(params)

    async def progress(self, progress: float, total: float | None, message: str | None) -> None:
        """Report progress to the caller, where it waits."""
        if self._here:
            await self.ctx.session.report_progress(progress, total, message)

    async def ask(self, request: types.InputRequest) -> Answer:
        if len(self._questions) >= MAX_QUESTIONS:
            return refused(f"{MAX_QUESTIONS} questions of this call wait for their answers")
        self._asked += 1
        key, question = f"q{self._asked}", _Question(request)
        self._questions[key] = question
        self._changed.set()
        try:
            with anyio.move_on_after(ANSWER_SECONDS):
                await question.answered.wait()
        finally:
            self._questions.pop(key, None)
        if question.answer is None:
            return refused(f"the caller did not answer in {ANSWER_SECONDS:g} s")
        return question.answer

    def answer(self, answers: types.InputResponses) -> None:
        """Pass the caller's answers on; a question without one stays open."""
        for key, answer in answers.items():
            if (question := self._questions.pop(key, None)) is not None:
                question.answer = answer
                question.answered.set()

    async def turn(self, ctx: Ctx) -> types.InputRequests | BaseModel:
        """Wait until the call asks or ends, for one request of its caller; a caller that leaves ends it.

        Raises:
            MCPError: The call failed.
        """
        self.ctx, self._here = ctx, True
        try:
            while not self._ended and not self._questions:
                self._changed = anyio.Event()
                await self._changed.wait()
        except BaseException:
            self.end()
            raise
        finally:
            self._here = False
        if not self._ended:
            return {key: question.request for key, question in self._questions.items()}
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome is None:
            raise MCPError(types.INTERNAL_ERROR, "the call was ended, since its caller did not come back to it")
        return self._outcome


class Turns:
    """The calls that wait for their callers' answers, by the state that takes them up again.

    Args:
        tasks: Where the work of the calls is done.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._waiting: dict[str, TurnCall] = {}

    async def take(self, ctx: Ctx, params: types.InputResponseRequestParams, work: Work) -> BaseModel:
        """Begin a call, or go on with the one whose state `params` carries, until it asks or ends.

        Args:
            work: What a new call is to do.

        Raises:
            MCPError: The call failed, or the state is of no call, or of another one than this request makes.
        """
        if params.request_state is None:
            call = TurnCall(ctx, params)
            self._tasks.start_soon(call.run, work)
        else:
            call = self._waiting.get(params.request_state)
            if call is None or not call.is_for(ctx, params):
                raise MCPError(
                    INVALID_PARAMS,
                    "Invalid or expired requestState: make the request again without it",
                    {"reason": "invalid_request_state"},
                )
            del self._waiting[params.request_state]
            call.answer(params.input_responses or {})
        done = await call.turn(ctx)
        if isinstance(done, BaseModel):
            return done
        return types.InputRequiredResult(input_requests=done, request_state=self._keep(call))

    def _keep(self, call: TurnCall) -> str:
        if len(self._waiting) >= MAX_SUSPENDED:
            self._waiting.pop(next(iter(self._waiting))).end()
        state = secrets.token_urlsafe(24)
        self._waiting[state] = call
        return state


def _identity(ctx: Ctx, params: types.InputResponseRequestParams) -> object:
    return ctx.method, params.model_dump(exclude={"meta", "input_responses", "request_state"})
