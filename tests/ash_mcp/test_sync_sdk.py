"""The sync twin: it works, and it is the same."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Sequence
from typing import assert_type

import pytest

import ash_mcp
from ash_mcp import CommandFailed, LocalProtocolError, Progress, SandboxGone, sync
from tests.ash_mcp.twin import TERMINAL, TwinHive

PAIRS = [
    (ash_mcp.Hive, sync.Hive),
    (ash_mcp.Sandbox, sync.Sandbox),
    (ash_mcp.Run, sync.Run),
    (ash_mcp.Files, sync.Files),
    (ash_mcp.Job, sync.Job),
    (ash_mcp.OutputStream, sync.OutputStream),
]


@pytest.fixture
def hive(twin: TwinHive) -> Iterator[sync.Hive]:
    with sync.Hive(transport=twin.transport) as hive:
        yield hive


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda cls: cls.__name__)
def test_names_and_arguments_are_the_same(one: type, other: type):
    names = {name for name in vars(one) if not name.startswith("_")}
    assert {name for name in vars(other) if not name.startswith("_")} == names
    for name in names:
        ours, theirs = getattr(one, name), getattr(other, name)
        assert isinstance(ours, property) == isinstance(theirs, property)
        if not isinstance(ours, property):
            assert _arguments(ours) == _arguments(theirs), name
            assert not inspect.iscoroutinefunction(theirs)


def _arguments(function: object) -> list[tuple[str, object, object, str]]:
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default, re.sub(r"\w+\.", "", str(p.annotation))) for p in parameters]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda cls: cls.__name__)
def test_docstrings_are_the_same(one: type, other: type):
    names = {name for name, member in vars(one).items() if inspect.isfunction(member) and not name.startswith("_")}
    for name in names - {"aclose"}:  # a sync hive's ends a thread as well
        assert inspect.getdoc(getattr(other, name)) == inspect.getdoc(getattr(one, name)), name


def test_type_checkers_and_help_see_what_methods_return(hive: sync.Hive):
    with assert_type(hive.spawn(), sync.Spawned) as box:
        assert_type(hive.list(), Sequence[ash_mcp.SandboxInfo])
        assert_type(box.exec("true"), ash_mcp.ExecResult)
        assert_type(box.background("true"), sync.Job)
        assert_type(list(box.stream("true")), list[ash_mcp.Chunk])
        assert_type(box.files.write("a", "b"), int)
    assert inspect.signature(sync.Hive.spawn).return_annotation is sync.Spawned
    assert inspect.signature(sync.Sandbox.stream).return_annotation is sync.OutputStream


def test_hive_takes_the_same_arguments():
    assert _arguments(ash_mcp.Hive.__init__) == _arguments(sync.Hive.__init__)


def test_whole_walk_without_await(hive: sync.Hive):
    news: list[Progress] = []
    with hive.spawn("general", env={"WHO": "you"}, session="walk", on_progress=news.append) as box:
        assert news
        assert box.exec("echo hello $WHO").stdout == "hello you\n"
        with pytest.raises(CommandFailed):
            box.exec("exit 1", check=True)
        box.files.write("notes.txt", "hi")
        assert box.files.read("notes.txt") == "hi"
        assert [entry.name for entry in box.files.list()] == ["notes.txt"]
        assert TERMINAL in {tool.name for tool in box.tools()}
        assert "Linux" in box.call(TERMINAL, command="uname -a").text
        with box.stream("echo one; sleep 0.05; echo two") as stream:
            assert b"".join(chunk.data for chunk in stream) == b"one\ntwo\n"
            assert stream.result.exit_code == 0
        job = box.background("read x; echo $x", stdin=True)
        job.write("word\n", eof=True)
        assert job.wait(timeout_seconds=10).exit_code == 0
        assert [chunk.data for chunk in job] == [b"word\n"]
        assert box.set_network("none").network == box.info.network == "none"
        share = box.share(ttl_seconds=60)
        assert box.shares() == [share.info] and box.revoke_shares(share.id) == [share.id]
        assert hive.attach("walk").id == box.id
    assert hive.list() == []
    with pytest.raises(SandboxGone):
        box.exec("true")


def test_attached_handle_ends_nothing(hive: sync.Hive):
    box = hive.spawn()
    hive.attach(box.session).aclose()
    assert [info.id for info in hive.list()] == [box.id]
    assert [info.id for info in hive.destroy_all().destroyed] == [box.id]


def test_several_threads_share_one_hive(hive: sync.Hive):
    outputs: list[str] = []

    def work(number: int) -> None:
        with hive.spawn() as box:
            outputs.append(box.exec(f"echo {number}").stdout.strip())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(outputs) == [str(number) for number in range(8)]


def test_closed_hive_refuses_calls_and_leaves_no_thread(twin: TwinHive):
    before = threading.active_count()
    hive = sync.Hive(transport=twin.transport)
    hive.list()
    hive.aclose()
    hive.aclose()
    with pytest.raises(LocalProtocolError, match="closed"):
        hive.list()
    assert threading.active_count() <= before + 1
