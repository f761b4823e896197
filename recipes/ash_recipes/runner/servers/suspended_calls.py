"""Multi-round-trip requests (MCP 2026-07-28) in front of a recipe's server of the handshake era.

Such a server asks its caller (elicitation, sampling, roots) in the middle of a call, but a stateless caller can only
be asked by the result of its request (`input_required`). So the call is suspended here while its request is answered
with the questions. The caller repeats the request with its answers and the `requestState` that came with the
questions, and so resumes the call. A state is good once, for the same request, and only while the call is suspended.
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

__all__ = ["MAX_QUESTIONS", "MAX_SUSPENDED", "ResumableCall", "SuspendedCalls"]

MAX_SUSPENDED: Final = 64
"""How many calls may wait for their callers' answers; over it the one that waits longest is cancelled."""
MAX_QUESTIONS: Final = 16
"""How many questions of one call may be open at once."""
ANSWER_SECONDS: Final = 600.0
"""How long a question waits for its answer."""

Work = Callable[["ResumableCall"], Awaitable[BaseModel]]


@dataclass(slots=True, eq=False)
class _Question:
    request: types.InputRequest
    answer: Answer | None = None
    answered: anyio.Event = field(default_factory=anyio.Event)


class ResumableCall:
    """A call that may take several requests, its turns. Between them its caller gets no progress and no log."""

    def __init__(self, ctx: Ctx, params: types.InputResponseRequestParams) -> None:
        self.ctx = ctx
        self._request = _identity(ctx, params)
        self._in_turn = False
        """Whether a request of the caller waits for this call."""
        self._questions: dict[str, _Question] = {}
        """The open questions, by the key under which the caller answers."""
        self._question_count = 0
        self._changed = anyio.Event()
        self._scope = anyio.CancelScope()
        self._ended = False
        self._outcome: BaseModel | Exception | None = None

    async def run(self, work: Work) -> None:
        """Do the call's work to its end, across all turns, and keep its outcome for `turn`."""
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
        """Return whether a request repeats the one that began this call."""
        return self._request == _identity(ctx, params)

    async def log(self, params: types.LoggingMessageNotificationParams) -> None:
        if self._in_turn:
            await SessionCall(self.ctx).log(params)

    async def progress(self, progress: float, total: float | None, message: str | None) -> None:
        """Report progress to the caller, if one of its requests waits for this call."""
        if self._in_turn:
            await self.ctx.session.report_progress(progress, total, message)

    async def ask(self, request: types.InputRequest) -> Answer:
        """Open a question, end the turn with it, and wait for the answer that a later turn brings.

        Returns:
            The answer, or an error where none comes in time or too many questions are open.
        """
        if len(self._questions) >= MAX_QUESTIONS:
            return refused(f"{MAX_QUESTIONS} questions of this call wait for their answers")
        self._question_count += 1
        key, question = f"q{self._question_count}", _Question(request)
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
        """Give open questions their answers; a question without one stays open."""
        for key, answer in answers.items():
            if (question := self._questions.pop(key, None)) is not None:
                question.answer = answer
                question.answered.set()

    async def turn(self, ctx: Ctx) -> types.InputRequests | BaseModel:
        """Wait, for one request of the caller, until the call has an open question or has ended.

        A caller that leaves cancels the call.

        Returns:
            The open questions, or the result.

        Raises:
            MCPError: The call failed or was cancelled.
        """
        self.ctx, self._in_turn = ctx, True
        try:
            while not self._ended and not self._questions:
                self._changed = anyio.Event()
                await self._changed.wait()
        except BaseException:
            self.end()
            raise
        finally:
            self._in_turn = False
        if not self._ended:
            return {key: question.request for key, question in self._questions.items()}
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome is None:
            raise MCPError(types.INTERNAL_ERROR, "the call was ended, since its caller did not come back to it")
        return self._outcome


class SuspendedCalls:
    """The calls that wait for their callers' answers, by the `requestState` that resumes each.

    Args:
        tasks: The task group in which the calls run.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._suspended: dict[str, ResumableCall] = {}
        """The call that waits longest comes first."""

    async def begin_or_resume(self, ctx: Ctx, params: types.InputResponseRequestParams, work: Work) -> BaseModel:
        """Begin a call, or resume the one whose `requestState` `params` carries, until it asks or ends.

        Args:
            work: What a new call does; it asks by the `ResumableCall` that it is given.

        Returns:
            The result of the call, or an `InputRequiredResult` with its questions and a new state.

        Raises:
            MCPError: The call failed; or no suspended call has that state, or it was begun by another request.
        """
        if params.request_state is None:
            call = ResumableCall(ctx, params)
            self._tasks.start_soon(call.run, work)
        else:
            call = self._suspended.get(params.request_state)
            if call is None or not call.is_for(ctx, params):
                raise MCPError(
                    INVALID_PARAMS,
                    "Invalid or expired requestState: make the request again without it",
                    {"reason": "invalid_request_state"},
                )
            del self._suspended[params.request_state]
            call.answer(params.input_responses or {})
        done = await call.turn(ctx)
        if isinstance(done, BaseModel):
            return done
        return types.InputRequiredResult(input_requests=done, request_state=self._suspend(call))

    def _suspend(self, call: ResumableCall) -> str:
        """Keep a call for its caller's next request, and return the state that resumes it."""
        if len(self._suspended) >= MAX_SUSPENDED:
            self._suspended.pop(next(iter(self._suspended))).end()
        state = secrets.token_urlsafe(24)
        self._suspended[state] = call
        return state


def _identity(ctx: Ctx, params: types.InputResponseRequestParams) -> object:
    """Return what all requests of one call have in common: method and parameters, but for answers and state."""
    return ctx.method, params.model_dump(exclude={"meta", "input_responses", "request_state"})
