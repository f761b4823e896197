"""What users do with a sandbox, on any hive."""

from __future__ import annotations

import anyio
import pytest

from ash_mcp import (
    AshTimeout,
    CommandFailed,
    CommandNotStarted,
    ConfigError,
    Hive,
    JobNotFound,
    LocalProtocolError,
    NotFound,
    PortNotAllowed,
    Progress,
    RecipeNotFound,
    Sandbox,
    SandboxGone,
    SandboxNotFound,
    SessionTaken,
    State,
)

pytestmark = pytest.mark.anyio

TERMINAL = "terminal-controller_execute_command"


async def test_sandbox_of_a_with_block_is_ended_at_its_end(hive: Hive):
    async with hive.spawn("general", env={"WHO": "you"}) as box:
        done = await box.exec("echo hello $WHO")
        assert (done.stdout, done.stderr, done.exit_code) == ("hello you\n", "", 0)
        assert box.info.state is State.READY
    with pytest.raises(SandboxGone) as caught:
        await box.exec("true")
    assert caught.value.data["reason"] == "destroyed"


async def test_awaited_spawn_lives_until_it_is_destroyed(hive: Hive):
    box = await hive.spawn()
    assert box.id in {info.id for info in await hive.list()}
    await box.destroy()
    await box.destroy()
    assert box.id not in {info.id for info in await hive.list()}
    ended = {info.id: info for info in await hive.list(include_ended=True)}
    assert ended[box.id].state.ended


async def test_one_spawn_makes_one_sandbox(hive: Hive):
    spawning = hive.spawn()
    box = await spawning
    with pytest.raises(LocalProtocolError, match="makes one sandbox"):
        await spawning
    await box.destroy()


async def test_same_idempotency_key_returns_the_same_sandbox(hive: Hive):
    async with hive.spawn(idempotency_key="once-and-only-once") as box:
        again = await hive.spawn(idempotency_key="once-and-only-once")
        assert again.id == box.id


async def test_sandbox_is_ended_when_the_block_fails_and_the_failure_goes_through(hive: Hive):
    with pytest.raises(ZeroDivisionError):
        async with hive.spawn(session="willfail"):
            raise ZeroDivisionError
    assert "willfail" not in {info.session for info in await hive.list()}


async def test_sandbox_is_ended_when_the_block_is_cancelled(hive: Hive):
    with anyio.CancelScope() as scope:
        async with hive.spawn(session="cutshort"):
            scope.cancel()
            await anyio.sleep_forever()
    assert "cutshort" not in {info.session for info in await hive.list()}


async def test_unknown_recipe_is_refused_with_what_there_is(hive: Hive):
    with pytest.raises(RecipeNotFound, match="general"):
        await hive.spawn("no-such-recipe")


async def test_session_name_of_a_living_sandbox_is_taken(hive: Hive):
    async with hive.spawn(session="twice"):
        with pytest.raises(SessionTaken):
            await hive.spawn(session="twice")


async def test_spawn_tells_its_progress(hive: Hive):
    news: list[Progress] = []
    async with hive.spawn(on_progress=news.append):
        assert news
        assert all(piece.message for piece in news)


async def test_attach_finds_by_name_and_by_id_and_dropping_the_handle_ends_nothing(hive: Hive, box: Sandbox):
    for name in (box.session, box.id):
        handle = await hive.attach(name)
        assert handle.id == box.id
        assert (await handle.exec("echo same")).stdout == "same\n"
        await handle.aclose()
        with pytest.raises(LocalProtocolError, match="attach"):
            await handle.exec("true")
    assert (await box.exec("echo alive")).stdout == "alive\n"


async def test_attach_tells_what_never_was_from_what_has_ended(hive: Hive):
    with pytest.raises(SandboxNotFound):
        await hive.attach("neverwas")
    box = await hive.spawn(session="shortlived")
    await box.destroy()
    with pytest.raises(SandboxGone) as caught:
        await hive.attach("shortlived")
    assert caught.value.data["reason"] == "destroyed"


async def test_destroy_says_what_there_was(hive: Hive):
    first, second = await hive.spawn(), await hive.spawn()
    done = await hive.destroy(first.session, second.id, "neverwas")
    assert {info.id for info in done.destroyed} == {first.id, second.id}
    assert list(done.not_found) == ["neverwas"]
    assert not (await hive.destroy()).destroyed


async def test_list_filters_by_labels(hive: Hive):
    async with hive.spawn(labels={"run": "42"}) as mine, hive.spawn():
        assert [info.id for info in await hive.list(labels={"run": "42"})] == [mine.id]


async def test_extend_moves_the_expiry(hive: Hive):
    async with hive.spawn(ttl_seconds=60) as box:
        before = box.info.expires_at
        assert (await box.extend(3600)).expires_at > before + 3000
        assert (await hive.extend(box.session, 7200)).expires_at > before + 6000


async def test_a_network_is_set_by_its_word_or_a_list_and_is_in_the_info(hive: Hive):
    async with hive.spawn() as box:
        assert (await box.set_network(["pypi.org", "*.pypi.org"])).network == ("pypi.org", "*.pypi.org")
        assert box.info.network == ("pypi.org", "*.pypi.org")
        assert (await hive.set_network(box.session, "none")).network == "none"
        assert [info.network for info in await hive.list()] == ["none"]


async def test_a_share_is_made_with_a_token_that_is_shown_once_listed_and_revoked(box: Sandbox):
    narrow, whole = await box.share(tools=[TERMINAL], ttl_seconds=60), await box.share()
    assert narrow.info.tools == (TERMINAL,) and (narrow.info.expires_at or 0) > narrow.info.created_at + 50
    assert whole.info.expires_at is None and whole.headers == {"Authorization": f"Bearer {whole.token}"}
    assert narrow.token not in repr(narrow)
    assert await box.shares() == [narrow.info, whole.info]
    with pytest.raises(NotFound):
        await box.revoke_shares("nobody")
    assert await box.revoke_shares(narrow.id) == [narrow.id]
    assert await box.revoke_shares() == [whole.id]
    assert await box.shares() == []


async def test_a_share_of_a_port_opens_no_tool_that_is_not_named(hive: Hive):
    async with hive.spawn(ports=[8000, 9000]) as box:
        assert box.info.ports == (8000, 9000)
        assert f"/s/{box.id}/ports/8000/" in box.port_url(8000)
        port, both = (
            await box.share(ports=[8000], ttl_seconds=60),
            await box.share(tools=[TERMINAL], ports=[8000, 9000]),
        )
        assert (port.info.tools, port.info.ports) == ((), (8000,)) and port.info.expires_at is not None
        assert (both.info.tools, both.info.ports) == ((TERMINAL,), (8000, 9000)) and both.token not in repr(both)
        with pytest.raises(PortNotAllowed):
            await box.share(ports=[80])
        assert await box.shares() == [port.info, both.info]


async def test_commands_take_words_stdin_and_environment(box: Sandbox):
    assert (await box.exec(["printf", "%s|", "a b", "$HOME"])).stdout == "a b|$HOME|"
    assert (await box.exec("cat", stdin="fed")).stdout == "fed"
    assert (await box.exec("echo $X", env={"X": "set"})).stdout == "set\n"
    await box.files.mkdir("deep/er")
    assert (await box.exec("basename $PWD", cwd="deep/er")).stdout == "er\n"


async def test_exit_code_of_a_command_that_a_signal_ended_is_128_and_its_number(box: Sandbox):
    assert (await box.exec("kill -9 $$")).exit_code == 137
    assert (await (await box.background("kill -TERM $$")).wait()).exit_code == 143


async def test_exit_code_is_data_unless_checked(box: Sandbox):
    assert (await box.exec("exit 7")).exit_code == 7
    with pytest.raises(CommandFailed, match="exited with code 7: sorry") as caught:
        await box.exec("echo sorry >&2; exit 7", check=True)
    assert caught.value.result.exit_code == 7
    assert caught.value.trainable and not caught.value.retryable


async def test_timeout_stops_the_command_and_says_so(box: Sandbox):
    for seconds in (0.5, 5, 30):  # on a busy machine it may not begin in the first
        done = await box.exec("echo first; sleep 60", timeout_seconds=seconds)
        assert done.timed_out
        if done.stdout:
            break
    assert done.stdout == "first\n"
    with pytest.raises(CommandFailed, match="timeout"):
        await box.exec("sleep 60", timeout_seconds=0.5, check=True)


async def test_bytes_that_are_not_utf8_come_whole(box: Sandbox):
    done = await box.exec(r"printf 'a\xff\x00b'")
    assert done.stdout_raw == b"a\xff\x00b"
    assert done.stdout == "a\ufffd\0b"


async def test_output_over_the_limit_is_cut_with_its_total_and_kept(box: Sandbox):
    done = await box.exec("head -c 5000 /dev/zero | tr '\\0' x", output_limit=100)
    assert done.truncated and done.stdout_bytes == 5000 and len(done.stdout) < 1000
    assert done.output_file is not None
    assert await box.files.read(done.output_file) == "x" * 5000


async def test_program_that_does_not_exist_is_a_typed_error_of_the_sandbox(box: Sandbox):
    with pytest.raises(CommandNotStarted) as caught:
        await box.exec(["/no/such/program"])
    assert caught.value.trainable and not caught.value.retryable


async def test_tools_are_called_by_keyword_or_by_mapping(box: Sandbox):
    (terminal,) = [tool for tool in await box.tools() if tool.name == TERMINAL]
    assert "command" in terminal.input_schema["properties"]
    result = await box.call(TERMINAL, command="echo by keyword")
    assert "by keyword" in result.text and result.structured["exit_code"] == 0 and not result.is_error
    assert "by mapping" in (await box.call(TERMINAL, arguments={"command": "echo by mapping"})).text


async def test_an_unknown_tool_is_an_error_of_the_sandboxs_own_server(box: Sandbox):
    result = await box.call("no_such_tool")
    assert result.is_error and "no_such_tool" in result.text


async def test_arguments_that_are_not_json_are_refused_before_they_are_sent(box: Sandbox):
    for bad in (object(), float("nan"), "\ud800"):
        with pytest.raises(ConfigError, match="cannot be sent as JSON"):
            await box.call(TERMINAL, command=bad)


async def test_logs_are_text(box: Sandbox):
    assert isinstance(await box.logs(), str)


async def test_stream_brings_both_streams_in_order_and_adds_up(box: Sandbox):
    stream = box.stream("echo out; sleep 0.05; echo err >&2; sleep 0.05; printf end; exit 3")
    with pytest.raises(LocalProtocolError):
        _ = stream.result
    chunks = [chunk async for chunk in stream]
    assert b"".join(c.data for c in chunks if c.stream == "stdout") == b"out\nend"
    assert b"".join(c.data for c in chunks if c.stream == "stderr") == b"err\n"
    assert [c.offset for c in chunks] == [0, 4, 8]
    assert (stream.result.exit_code, stream.result.total_bytes, stream.result.lost_bytes) == (3, 11, 0)


async def test_stream_brings_the_first_output_before_the_end(box: Sandbox):
    with anyio.fail_after(10):
        async with box.stream("echo now; sleep 60") as stream:
            assert (await anext(stream)).data == b"now\n"


async def test_stream_left_early_stops_its_command(box: Sandbox):
    async with box.stream("echo $$; sleep 60") as stream:
        await anext(stream)
    (job,) = await box.jobs()
    with anyio.fail_after(10):
        assert (await box.job(job.id).wait()).exit_code != 0


async def test_stream_that_is_cancelled_stops_its_command(box: Sandbox):
    stream = box.stream("echo up; sleep 60")
    await anext(stream)
    with anyio.move_on_after(0.1) as scope:
        await anext(stream)
    assert scope.cancelled_caught
    (job,) = await box.jobs()
    with anyio.fail_after(10):
        await box.job(job.id).wait()


async def test_stream_feeds_stdin(box: Sandbox):
    assert b"".join([c.data async for c in box.stream("tr a-z A-Z", stdin="loud")]) == b"LOUD"


async def test_background_job_is_written_to_read_and_waited_for(box: Sandbox):
    job = await box.background("read line; echo got $line; exit 4", stdin=True)
    await job.write("word\n")
    with anyio.fail_after(10):
        done = await job.wait()
    assert (done.exit_code, done.timed_out, done.total_bytes) == (4, False, 9)
    assert b"".join([chunk.data async for chunk in job]) == b"got word\n"
    assert (await job.read(4)).chunks[0].data == b"word\n"
    assert [info.id for info in await box.jobs() if not info.running] == [job.id]


async def test_waiting_for_a_job_has_a_bound_and_stopping_it_ends_it(box: Sandbox):
    job = await box.background("trap '' TERM; echo ready; while :; do sleep 0.1; done")
    assert (await anext(job.output())).data == b"ready\n"
    with pytest.raises(AshTimeout, match="still runs"):
        await job.wait(timeout_seconds=0.1)
    with anyio.fail_after(20):
        assert (await job.stop(grace_seconds=0.2)).exit_code != 0


async def test_unknown_job_is_a_typed_error(box: Sandbox):
    with pytest.raises(JobNotFound):
        await box.job("no-such-job").read()
