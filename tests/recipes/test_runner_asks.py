"""What servers in processes of their own ask of their callers, through a real runner, in every pair of eras."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import mcp_types as types
import pytest
from mcp.client.client import Client
from mcp.client.session import ClientRequestContext
from mcp.shared.exceptions import MCPError

from ash_recipes.runner.servers import suspended_calls
from ash_recipes.runner.servers.suspended_calls import MAX_SUSPENDED, ResumableCall
from tests.recipes.mcp_callers import Person, text
from tests.recipes.runner_parts import HERE, Runner, running

pytestmark = pytest.mark.anyio

ERAS = ("legacy", "2026-07-28")
# The first version that has elicitation.
OLD: dict[str, Any] = {"stdio": {"command": [sys.executable, str(HERE / "legacy_server.py"), "2025-06-18"]}}
MODERN: dict[str, Any] = {"stdio": {"command": [sys.executable, str(HERE / "modern_server.py")]}}


@pytest.fixture(scope="module")
def old() -> Generator[Runner]:
    with running(OLD, port=True) as runner:
        yield runner


@pytest.fixture(scope="module")
def modern() -> Generator[Runner]:
    with running(MODERN, port=True) as runner:
        yield runner


@pytest.fixture(params=["old", "modern"])
def asker(request: pytest.FixtureRequest) -> Runner:
    return request.getfixturevalue(request.param)


async def thought(
    context: ClientRequestContext, params: types.CreateMessageRequestParams
) -> types.CreateMessageResult:
    said = params.messages[0].content
    assert isinstance(said, types.TextContent)
    answer = types.TextContent(type="text", text=said.text.upper())
    return types.CreateMessageResult(role="assistant", content=answer, model="tested")


async def rooted(context: ClientRequestContext) -> types.ListRootsResult:
    return types.ListRootsResult(roots=[types.Root(uri="file:///home/me")])  # type: ignore[arg-type]


async def until_there(mark: Path) -> None:
    """Wait until a server has made a file."""
    with anyio.fail_after(20):
        while not await anyio.Path(mark).exists():
            await anyio.sleep(0.01)


@pytest.mark.parametrize("era", ERAS)
async def test_a_server_asks_its_caller_as_often_as_it_wants(asker: Runner, era: str) -> None:
    person = Person("one", "two")
    async with asker.client(era, elicitation_callback=person.elicited) as client:
        assert text(await client.call_tool("ask", {})) == "one, then two"
    assert person.asked == ["first?", "after one?"]


@pytest.mark.parametrize("era", ERAS)
async def test_a_server_asks_the_callers_model_and_for_its_roots(old: Runner, era: str) -> None:
    async with old.client(era, sampling_callback=thought, list_roots_callback=rooted) as client:
        assert text(await client.call_tool("think", {"text": "hé"})) == "HÉ"
        assert text(await client.call_tool("roots", {})) == "file:///home/me"


@pytest.mark.parametrize("era", ERAS)
async def test_a_caller_that_cannot_be_asked_is_not(old: Runner, era: str) -> None:
    async with old.client(era) as client:
        assert text(await client.call_tool("ask", {})) == "the caller does not support elicitation"


async def test_a_stateless_server_that_never_has_enough_is_stopped(modern: Runner) -> None:
    person = Person(*["again"] * 20)
    async with modern.client("legacy", elicitation_callback=person.elicited) as client:
        with pytest.raises(MCPError, match="asked more than 10 times"):
            await client.call_tool("insist", {})
    assert len(person.asked) == 10


@pytest.mark.parametrize("era", ERAS)
async def test_of_several_callers_none_is_asked(old: Runner, era: str) -> None:
    """What the server asks could be the other one's."""
    person = Person("one", "two")
    mark = old.workspace / f"several-{era}"
    async with old.client(era, elicitation_callback=person.elicited) as client, old.client(era) as other:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: other.call_tool("wait", {"text": str(mark)}))
            await until_there(Path(f"{mark}.begun"))
            assert text(await client.call_tool("ask", {})).startswith("several callers have calls open")
            group.cancel_scope.cancel()
        await until_there(mark)
        assert text(await client.call_tool("ask", {})) == "one, then two"


async def test_calls_of_one_session_are_one_callers(old: Runner) -> None:
    person = Person("one", "two")
    mark = old.workspace / "one-session"
    async with old.client("legacy", elicitation_callback=person.elicited) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.call_tool("wait", {"text": str(mark)}))
            await until_there(Path(f"{mark}.begun"))
            assert text(await client.call_tool("ask", {})) == "one, then two"
            group.cancel_scope.cancel()


# Calls of stateless callers, request by request.


async def _asked(client: Client, name: str = "ask", **more: Any) -> types.InputRequiredResult:
    result = await client.session.call_tool(name, {}, allow_input_required=True, **more)
    assert isinstance(result, types.InputRequiredResult) and result.request_state is not None
    return result


def _answers(result: types.InputRequiredResult, word: str) -> dict[str, types.InputResponse]:
    assert result.input_requests is not None
    return dict.fromkeys(result.input_requests, types.ElicitResult(action="accept", content={"value": word}))


async def test_a_call_is_taken_up_by_another_connection(old: Runner) -> None:
    person = Person()
    async with AsyncExitStack() as stack:
        first, second, third = [
            await stack.enter_async_context(old.client("2026-07-28", elicitation_callback=person.elicited))
            for _ in range(3)
        ]
        one = await _asked(first)
        two = await _asked(second, input_responses=_answers(one, "a"), request_state=one.request_state)
        assert two.request_state != one.request_state
        done = await third.session.call_tool(
            "ask", {}, input_responses=_answers(two, "b"), request_state=two.request_state
        )
    assert text(done) == "a, then b"


async def test_a_state_is_good_once_and_for_its_own_request(old: Runner) -> None:
    person = Person()
    async with old.client("2026-07-28", elicitation_callback=person.elicited) as client:
        one = await _asked(client)
        answers = _answers(one, "a")
        for name, state in (("think", one.request_state), ("ask", "guessed")):
            with pytest.raises(MCPError, match="Invalid or expired requestState"):
                await _asked(client, name, input_responses=answers, request_state=state)
        await _asked(client, input_responses=answers, request_state=one.request_state)
        with pytest.raises(MCPError, match="Invalid or expired requestState"):
            await _asked(client, input_responses=answers, request_state=one.request_state)


async def test_a_question_without_an_answer_is_asked_again(old: Runner) -> None:
    person = Person()
    async with old.client("2026-07-28", elicitation_callback=person.elicited) as client:
        one = await _asked(client)
        again = await _asked(client, request_state=one.request_state)
        assert again.input_requests == one.input_requests
        await _asked(client, input_responses=_answers(again, "a"), request_state=again.request_state)


async def test_over_the_limit_the_call_that_waits_longest_is_ended(old: Runner) -> None:
    person = Person()
    async with old.client("2026-07-28", elicitation_callback=person.elicited) as client:
        waiting = [await _asked(client) for _ in range(MAX_SUSPENDED + 1)]
        ended, *others = waiting
        with pytest.raises(MCPError, match="Invalid or expired requestState"):
            await _asked(client, input_responses=_answers(ended, "a"), request_state=ended.request_state)
        for one in (others[0], others[-1]):
            await _asked(client, input_responses=_answers(one, "a"), request_state=one.request_state)


async def test_a_question_that_nobody_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspended_calls, "ANSWER_SECONDS", 0.01)
    ctx: Any = SimpleNamespace(method="tools/call")
    answer = await ResumableCall(ctx, types.CallToolRequestParams(name="ask")).ask(types.ListRootsRequest())
    assert isinstance(answer, types.ErrorData) and answer.message == "the caller did not answer in 0.01 s"
