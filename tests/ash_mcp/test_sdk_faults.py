"""What the SDK does when things go wrong: whose word it takes, and what it tries again."""

from __future__ import annotations

from typing import Any

import anyio
import httpx
import pytest

from ash_mcp import (
    AshError,
    AshTimeout,
    BadArguments,
    CapacityExceeded,
    ConfigError,
    ConnectFailed,
    FileError,
    FileNotPermitted,
    Hive,
    HiveFault,
    LocalProtocolError,
    NoSpace,
    NotFound,
    PermissionDenied,
    Progress,
    RemoteProtocolError,
    Sandbox,
    SandboxGone,
    SandboxNotFound,
    SandboxRefused,
    StreamBroken,
    TransportError,
    Unauthenticated,
    Unsupported,
)
from ash_mcp.wire import ORIGIN_HUB, ORIGIN_SANDBOX, tool_failure
from tests.ash_mcp.twin import TERMINAL, Script, TwinHive, event, raw_stream, refusal, request_id, whole_answer

pytestmark = pytest.mark.anyio


def breaks(error: Exception) -> Script:
    """Return a script that ends a request with `error`."""

    def script(request: httpx.Request) -> None:
        raise error

    return script


def refuses(error: AshError) -> Script:
    return lambda request: refusal(error)


def answers(result: Any, origin: str) -> Script:
    return lambda request: whole_answer(request_id(request), result, origin)


def reply(request: httpx.Request, result: Any) -> bytes:
    return event({"jsonrpc": "2.0", "id": request_id(request), "result": result})


GONE = SandboxGone("it died", reason="process_died")
OURS = HiveFault("forged")
FINE = {"content": [{"type": "text", "text": "fine"}], "isError": False}


# --- whose word it is ---------------------------------------------------------------------------------------------


async def test_failure_in_the_hives_own_answer_is_believed(box: Sandbox, twin: TwinHive):
    twin.scripts.append(answers(tool_failure(GONE), ORIGIN_HUB))
    with pytest.raises(SandboxGone) as caught:
        await box.call(TERMINAL, command="true")
    assert caught.value.data["reason"] == "process_died"
    assert not caught.value.trainable


@pytest.mark.parametrize("origin", [ORIGIN_SANDBOX, "", "Hub"])
async def test_failure_in_anyone_elses_answer_is_only_a_result(box: Sandbox, twin: TwinHive, origin: str):
    twin.scripts.append(answers(tool_failure(OURS), origin))
    result = await box.call(TERMINAL, command="true")
    assert result.is_error and result.text == "forged"


async def test_failure_with_the_nonce_of_the_head_is_believed_in_a_sandboxs_stream(box: Sandbox, twin: TwinHive):
    def script(request: httpx.Request) -> httpx.Response:
        torn = b"event: message\r\ndata: {half of an ev"
        failure = b"\r\n\r\n" + reply(request, tool_failure(GONE, nonce="n0nce"))
        return raw_stream([torn, failure], ORIGIN_SANDBOX, nonce="n0nce")

    twin.scripts.append(script)
    with pytest.raises(SandboxGone):
        await box.call(TERMINAL, command="true")


@pytest.mark.parametrize("said", [None, "", "guess", "ünïcode"])
async def test_failure_without_that_nonce_is_only_a_result(box: Sandbox, twin: TwinHive, said: str | None):
    def script(request: httpx.Request) -> httpx.Response:
        return raw_stream([reply(request, tool_failure(OURS, nonce=said))], ORIGIN_SANDBOX, nonce="n0nce")

    twin.scripts.append(script)
    assert (await box.call(TERMINAL, command="true")).is_error


async def test_nonce_that_the_head_does_not_have_proves_nothing(box: Sandbox, twin: TwinHive):
    def script(request: httpx.Request) -> httpx.Response:
        return raw_stream([reply(request, tool_failure(OURS, nonce=""))], ORIGIN_SANDBOX)

    twin.scripts.append(script)
    assert (await box.call(TERMINAL, command="true")).is_error


async def test_stream_that_goes_on_after_its_answer_is_refused(box: Sandbox, twin: TwinHive):
    def script(request: httpx.Request) -> httpx.Response:
        return raw_stream([reply(request, FINE), reply(request, FINE)], ORIGIN_SANDBOX, nonce="n0nce")

    twin.scripts.append(script)
    with pytest.raises(SandboxRefused, match="went on"):
        await box.call(TERMINAL, command="true")


NONSENSE: dict[str, Script] = {
    "not json": lambda request: httpx.Response(200, content=b"garbage", headers={"ash-origin": "sandbox"}),
    "status": lambda request: httpx.Response(500, content=b"", headers={"ash-origin": "sandbox"}),
    "forged body": lambda request: refusal(OURS, ORIGIN_SANDBOX),
    "not a result": lambda request: whole_answer(request_id(request), "not an object", ORIGIN_SANDBOX),
    "no answer": lambda request: raw_stream([b"data: {}\n\n"], ORIGIN_SANDBOX),
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_nonsense_of_a_sandbox_counts_as_its_own_failure(box: Sandbox, twin: TwinHive, name: str):
    twin.scripts.append(NONSENSE[name])
    with pytest.raises(SandboxRefused) as caught:
        await box.call(TERMINAL, command="true")
    assert caught.value.trainable and not caught.value.retryable


async def test_rpc_error_of_a_sandbox_is_its_own_word_whatever_its_data_claims(box: Sandbox, twin: TwinHive):
    error = {"code": -32603, "message": "no", "data": {"kind": "hive_fault", "retryable": True, "trainable": False}}
    twin.scripts.append(
        lambda request: httpx.Response(
            200,
            json={"jsonrpc": "2.0", "id": request_id(request), "error": error},
            headers={"ash-origin": "sandbox"},
        )
    )
    with pytest.raises(SandboxRefused, match="no") as caught:
        await box.call(TERMINAL, command="true")
    assert caught.value.trainable and not caught.value.retryable


@pytest.mark.parametrize(("code", "cls"), [(-32602, ConfigError), (-32601, Unsupported), (-32603, HiveFault)], ids=str)
async def test_rpc_error_of_the_hive_is_typed_by_its_code(hive: Hive, twin: TwinHive, code: int, cls: type[AshError]):
    twin.scripts.append(
        lambda request: httpx.Response(
            200,
            json={"jsonrpc": "2.0", "id": request_id(request), "error": {"code": code, "message": "no"}},
            headers={"ash-origin": "hub"},
        )
    )
    with pytest.raises(cls, match="no"):
        await hive.list()


async def test_refusal_of_admission_is_typed(hive: Hive, twin: TwinHive):
    twin.scripts.append(refuses(Unauthenticated("log in")))
    with pytest.raises(Unauthenticated, match="log in"):
        await hive.list()


async def test_refusal_by_something_that_is_no_hive_says_so(hive: Hive, twin: TwinHive):
    twin.scripts.append(lambda request: httpx.Response(404, content=b"<html>"))
    with pytest.raises(RemoteProtocolError, match="ASH_URL"):
        await hive.list()
    twin.scripts.append(lambda request: httpx.Response(302, headers={"location": "http://elsewhere/"}))
    with pytest.raises(RemoteProtocolError, match="302"):
        await hive.list()


async def test_tool_that_asks_its_caller_is_unsupported(box: Sandbox, twin: TwinHive):
    twin.scripts.append(answers({"resultType": "input_required", "inputRequests": {}}, ORIGIN_SANDBOX))
    with pytest.raises(Unsupported):
        await box.call(TERMINAL, command="true")


async def test_answer_over_the_bound_is_not_read_into_memory(tmp_path: Any, twin: TwinHive):
    from ash_mcp import ClientSettings

    async with Hive(settings=ClientSettings(max_reply_bytes=5_000), transport=twin.transport) as hive:
        async with hive.spawn() as box:
            twin.scripts.append(answers({"content": [{"type": "text", "text": "x" * 6_000}]}, ORIGIN_SANDBOX))
            with pytest.raises(SandboxRefused, match="5000 bytes"):
                await box.call(TERMINAL, command="true")
            twin.scripts.append(lambda request: raw_stream([b"data: " + b"x" * 6_000], ORIGIN_SANDBOX))
            with pytest.raises(SandboxRefused, match="5000 bytes"):
                await box.call(TERMINAL, command="true")


async def test_runner_that_answers_nonsense_is_a_typed_error(box: Sandbox, twin: TwinHive):
    shapes: list[Any] = [{"stdout": 1}, {}, None, [], {"stdout": "", "stderr": "", "exit_code": "0"}]
    for shape in shapes:
        twin.scripts.append(answers({"content": [], "structuredContent": shape}, ORIGIN_SANDBOX))
        with pytest.raises(SandboxRefused):
            await box.exec("true")


def says(kind: str) -> Script:
    error = {"kind": kind, "message": "no"}
    return answers({"isError": True, "structuredContent": {"error": error}}, ORIGIN_SANDBOX)


BREAKS: dict[str, Script] = {
    "connection": breaks(httpx.ReadError("reset")),
    "gateway": lambda request: httpx.Response(502, content=b"<html>"),
    "hive": refuses(StreamBroken("the sandbox broke off")),
}


@pytest.mark.parametrize("kind", ["abandoned", "job_not_found", "result_lost"])
@pytest.mark.parametrize("broke", BREAKS)
async def test_what_is_given_up_in_an_outage_is_the_outages_doing(box: Sandbox, twin: TwinHive, broke: str, kind: str):
    twin.scripts += [BREAKS[broke], says(kind)]
    with pytest.raises(StreamBroken, match="broken for so long") as caught:
        await box.exec("true")
    assert not caught.value.trainable and not caught.value.retryable


@pytest.mark.parametrize("kind", ["abandoned", "job_not_found", "result_lost"])
async def test_a_sandbox_cannot_say_that_there_was_an_outage(box: Sandbox, twin: TwinHive, kind: str):
    twin.scripts.append(says(kind))
    with pytest.raises(SandboxRefused) as caught:
        await box.exec("true")
    assert caught.value.trainable
    twin.scripts += [refuses(CapacityExceeded("later", retry_after_seconds=0.05)), says(kind)]
    with pytest.raises(SandboxRefused):
        await box.exec("true")  # it was not cut off, only told to wait


WRONG: dict[str, Script] = {
    "no hive there": breaks(httpx.ConnectError("refused")),
    "not http": breaks(httpx.RemoteProtocolError("garbage")),
    "a page": lambda request: httpx.Response(200, content=b"<html>", headers={"content-type": "text/html"}),
    "no page": lambda request: httpx.Response(404, content=b"<html>"),
    "another server's answer": lambda request: httpx.Response(404, json={"error": {"kind": "file_not_found"}}),
    "another MCP server": lambda request: whole_answer(request_id(request), tool_failure(GONE), "elsewhere"),
    "a wrong path": refuses(NotFound("there is nothing at /mpc")),
    "a redirect": lambda request: httpx.Response(307, headers={"location": "/"}),
    "a wrong key": refuses(Unauthenticated("this key is not known")),
    "a proxy's own login": lambda request: httpx.Response(403, content=b"<html>"),
    "a key for another scope": refuses(PermissionDenied("your key is not for scope 'x'")),
    "a quota": refuses(CapacityExceeded("too many", retryable=False)),
    "a lost sandbox": refuses(SandboxNotFound("there is no sandbox sb1")),
    "an ended sandbox": refuses(GONE),
    "bad arguments for the hive": answers({}, ORIGIN_HUB),
}


@pytest.mark.parametrize("what", WRONG)
async def test_nobody_learns_from_what_is_wrong_with_the_way(hive: Hive, twin: TwinHive, what: str):
    twin.scripts += [WRONG[what]] * 4
    with pytest.raises(AshError) as caught:
        await hive.list()
    assert not caught.value.trainable


@pytest.mark.parametrize("url", ["http://", "ftp://hive/mcp", "http://[::1/mcp", "not a url", "http://hive:99999/mcp"])
async def test_nobody_learns_from_a_bad_url(url: str):
    with pytest.raises(AshError) as caught:
        async with Hive(url) as hive:
            await hive.list()
    assert not caught.value.trainable


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("no_space", NoSpace),
        ("not_permitted", FileNotPermitted),
        ("file_error", FileError),
        ("bad_request", BadArguments),
        ("abandoned", SandboxRefused),
        ("hive_fault", SandboxRefused),
        ("timeout", SandboxRefused),
        ("from_the_future", SandboxRefused),
    ],
)
async def test_runner_may_say_only_its_own_kinds(box: Sandbox, twin: TwinHive, kind: str, cls: type[AshError]):
    error = {"kind": kind, "message": "no", "retryable": True, "trainable": False}
    twin.scripts.append(answers({"isError": True, "structuredContent": {"error": error}}, ORIGIN_SANDBOX))
    with pytest.raises(cls, match="no") as caught:
        await box.files.read("x")
    assert type(caught.value) is cls
    assert caught.value.trainable and not caught.value.retryable


async def test_job_output_that_does_not_add_up_is_refused(box: Sandbox, twin: TwinHive):
    state: dict[str, Any] = {"total_bytes": 10, "dropped_bytes": 0, "state": "exited", "exit_code": 0}
    piece = {"stream": "stdout", "offset": 0, "data_base64": "YWJj"}
    for chunks, following in (([piece, piece], 3), ([piece], 2), ([], 0)):
        stream = box.stream("true")
        twin.scripts.append(answers({"structuredContent": {"job": "j1", "started": True}}, ORIGIN_SANDBOX))
        twin.scripts.append(
            answers({"structuredContent": {**state, "chunks": chunks, "next_offset": following}}, ORIGIN_SANDBOX)
        )
        with pytest.raises(SandboxRefused):
            await anext(stream)


async def test_output_that_was_let_go_shows_as_a_gap_and_in_the_total(box: Sandbox, twin: TwinHive):
    twin.boxes[box.id].runner.job_buffer_bytes = 10
    job = await box.background("printf 123; sleep 0.2; printf 45678; sleep 0.2; printf abcdefg")
    await job.wait()
    stream = job.output()
    chunks = [chunk async for chunk in stream]
    assert [(chunk.offset, chunk.data) for chunk in chunks] == [(8, b"abcdefg")]
    assert (stream.result.total_bytes, stream.result.lost_bytes) == (15, 8)


# --- what is tried again ------------------------------------------------------------------------------------------


async def test_plain_call_is_never_repeated_once_it_may_have_run(box: Sandbox, twin: TwinHive):
    before = len(twin.seen)
    twin.after.append(breaks(httpx.ReadError("reset")))
    with pytest.raises(StreamBroken, match="unknown"):
        await box.call(TERMINAL, command="true")
    assert len(twin.seen) == before + 1
    assert twin.boxes[box.id].runner.runs == 0


async def test_plain_call_is_repeated_when_it_was_never_sent(box: Sandbox, twin: TwinHive):
    twin.scripts.append(breaks(httpx.ConnectError("refused")))
    assert "ran" in (await box.call(TERMINAL, command="echo ran")).text


async def test_hive_that_is_not_there_is_named_soon(twin: TwinHive, hive: Hive):
    twin.scripts.extend([breaks(httpx.ConnectError("refused"))] * 9)
    with anyio.fail_after(5), pytest.raises(ConnectFailed, match="ash up"):
        await hive.list()
    assert len(twin.scripts) == 5


async def test_command_whose_answer_was_lost_is_asked_for_again_and_runs_once(box: Sandbox, twin: TwinHive):
    twin.after.append(breaks(httpx.RemoteProtocolError("closed")))
    assert (await box.exec("echo $RANDOM > ran; cat ran")).stdout == await box.files.read("ran")
    assert twin.boxes[box.id].runner.runs == 1


async def test_spawn_whose_answer_was_lost_makes_one_sandbox(hive: Hive, twin: TwinHive):
    twin.after.append(breaks(httpx.ReadError("reset")))
    async with hive.spawn():
        assert len(twin.boxes) == 1


async def test_stream_that_breaks_before_its_answer_is_asked_for_again_where_that_is_safe(hive: Hive, twin: TwinHive):
    twin.scripts.append(lambda request: raw_stream([b": hi\n\n", httpx.ReadError("reset")], ORIGIN_HUB))
    twin.scripts.append(lambda request: raw_stream([b": hi\n\n"], ORIGIN_HUB))
    twin.scripts.append(lambda request: httpx.Response(503, content=b"<html>"))
    assert await hive.list() == []


async def test_gateways_refusal_of_a_plain_call_goes_to_the_caller(box: Sandbox, twin: TwinHive):
    twin.scripts.append(lambda request: httpx.Response(502, content=b"<html>"))
    with pytest.raises(TransportError, match="502"):
        await box.call(TERMINAL, command="true")


async def test_full_hive_is_asked_again_when_it_said_and_tells_why_it_waits(hive: Hive, twin: TwinHive):
    news: list[Progress] = []
    twin.scripts.extend([refuses(CapacityExceeded("full", retry_after_seconds=0.01))] * 6)
    async with hive.spawn(on_progress=news.append) as box:
        assert box.id in twin.boxes
    assert len([piece for piece in news if piece.message and "full" in piece.message]) == 6


async def test_full_hive_that_will_stay_full_past_the_bound_is_not_waited_for(hive: Hive, twin: TwinHive):
    twin.scripts.append(refuses(CapacityExceeded("full", retry_after_seconds=3600)))
    with anyio.fail_after(5), pytest.raises(CapacityExceeded):
        await hive.spawn()


async def test_refusal_that_is_not_retryable_is_final(hive: Hive, twin: TwinHive):
    twin.scripts.extend([refuses(GONE)] * 2)
    with pytest.raises(SandboxGone):
        await hive.list()
    assert len(twin.scripts) == 1


async def test_call_that_outlasts_its_bound_ends_in_our_timeout(box: Sandbox, twin: TwinHive):
    held = anyio.Event()
    twin.scripts.append(lambda request: raw_stream([b": working\n\n"], ORIGIN_SANDBOX, then=held))
    with anyio.fail_after(5), pytest.raises(TimeoutError) as caught:
        await box.call(TERMINAL, command="true", timeout_seconds=0.1)
    assert isinstance(caught.value, AshTimeout) and not caught.value.retryable


async def test_answer_does_not_wait_for_a_stream_that_stays_open(box: Sandbox, twin: TwinHive):
    held = anyio.Event()

    def script(request: httpx.Request) -> httpx.Response:
        return raw_stream([reply(request, FINE)], ORIGIN_SANDBOX, then=held)

    twin.scripts.append(script)
    with anyio.fail_after(5):
        assert (await box.call(TERMINAL, command="true")).text == "fine"


# --- the rest -----------------------------------------------------------------------------------------------------


async def test_every_request_carries_token_and_scope_and_names_the_sandbox_by_its_id(twin: TwinHive):
    async with Hive(token="key", scope="run42", transport=twin.transport) as hive:
        async with hive.spawn() as box:
            await box.exec("true")
    assert {(seen.headers["authorization"], seen.headers["ash-scope"]) for seen in twin.seen} == {
        ("Bearer key", "run42")
    }
    assert {seen.arguments["session"] for seen in twin.seen if seen.tool != "spawn"} == {box.id}


async def test_what_is_left_to_the_hive_is_not_sent(hive: Hive, twin: TwinHive):
    async with hive.spawn():
        assert set(twin.seen[-1].arguments) == {"idempotency_key"}


async def test_closed_hive_refuses_calls(twin: TwinHive):
    hive = Hive(transport=twin.transport)
    await hive.list()
    await hive.aclose()
    await hive.aclose()
    with pytest.raises(LocalProtocolError, match="closed"):
        await hive.list()


async def test_failure_to_end_a_sandbox_does_not_hide_why_the_block_failed(hive: Hive, twin: TwinHive):
    with pytest.raises(ZeroDivisionError) as caught:
        async with hive.spawn():
            twin.scripts.append(refuses(HiveFault("broken")))
            raise ZeroDivisionError
    assert "may still run: broken" in caught.value.__notes__[0]
    with pytest.raises(HiveFault):
        async with hive.spawn():
            twin.scripts.append(refuses(HiveFault("broken")))


async def test_hundreds_of_sandboxes_work_at_once_through_one_hive(hive: Hive, twin: TwinHive):
    async def one(number: int) -> None:
        async with hive.spawn() as box:
            await box.files.write("n", str(number))
            assert await box.files.read("n") == str(number)

    with anyio.fail_after(100):  # tells a hang from a busy machine
        async with anyio.create_task_group() as group:
            for number in range(200):
                group.start_soon(one, number)
    assert len(twin.boxes) == 200
    assert all(box.info.state.ended for box in twin.boxes.values())
