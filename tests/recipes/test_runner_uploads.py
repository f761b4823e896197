"""Files that are replaced as a whole: a reader sees the old one or the new one, however it came."""

from __future__ import annotations

import base64
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_recipes.runner import drafts, regular_files
from ash_recipes.runner.context import Context
from ash_recipes.runner.drafts import IDLE_SECONDS, Drafts
from ash_recipes.runner.files import Files
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call, refused

pytestmark = pytest.mark.anyio


async def put(tools: RunnerTools, path: str, data: bytes, **more: Any) -> int:
    coded = base64.b64encode(data).decode()
    return (await call(tools, "file_write", path=path, data_base64=coded, **more))["size"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


async def test_a_file_takes_its_place_with_its_last_piece(tools: RunnerTools, context: Context) -> None:
    target = context.workspace / "f"
    target.write_bytes(b"old")
    target.chmod(0o640)
    assert await put(tools, "f", b"abc", key="k", offset=0) == 3
    assert await put(tools, "f", b"def", key="k", offset=3) == 6
    assert target.read_bytes() == b"old"
    assert await put(tools, "f", b"g", key="k", offset=6, end="commit") == 7
    assert target.read_bytes() == b"abcdefg" and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(context.workspace) == ["f"]


async def test_a_piece_that_comes_again_does_no_harm_not_even_after_the_end(
    tools: RunnerTools, context: Context
) -> None:
    for offset, data in ((0, b"abc"), (3, b"def"), (0, b"abc")):
        await put(tools, "new/f", data, key="k", offset=offset, mode=0o700)
    for _ in range(2):
        assert await put(tools, "new/f", b"g", key="k", offset=6, end="commit") == 7
    (context.workspace / "new/f").write_bytes(b"changed since")
    assert await put(tools, "new/f", b"abc", key="k", offset=0) == 7
    assert await put(tools, "new/f", b"g", key="k", offset=6, end="commit") == 7
    assert (context.workspace / "new/f").read_bytes() == b"changed since"
    assert stat.S_IMODE((context.workspace / "new/f").stat().st_mode) == 0o700
    assert names(context.workspace / "new") == ["f"]


async def test_an_abandoned_file_leaves_nothing_and_a_late_piece_does_not_begin_it(
    tools: RunnerTools, context: Context
) -> None:
    await put(tools, "f", b"abc", key="k", offset=0)
    assert len(names(context.workspace)) == 1
    for _ in range(2):
        await put(tools, "f", b"", key="k", offset=0, end="abandon")
    await put(tools, "f", b"abc", key="k", offset=0)
    await put(tools, "f", b"", key="never began", offset=0, end="abandon")
    assert names(context.workspace) == []


async def test_of_parallel_uploads_to_one_path_one_wins_whole(tools: RunnerTools, context: Context) -> None:
    async def upload(letter: bytes) -> None:
        for piece in range(8):
            end = {"end": "commit"} if piece == 7 else {}
            await put(tools, "f", letter * 10_000, key=letter.decode(), offset=piece * 10_000, **end)

    async with anyio.create_task_group() as group:
        for letter in (b"a", b"b", b"c", b"d"):
            group.start_soon(upload, letter)
    found = (context.workspace / "f").read_bytes()
    assert found in {letter * 80_000 for letter in (b"a", b"b", b"c", b"d")} and names(context.workspace) == ["f"]


async def test_a_write_in_one_call_is_seen_whole_or_not_at_all(
    tools: RunnerTools, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = context.workspace / "f"
    target.write_bytes(b"old")
    seen: list[bytes] = []

    def write_some(file: Any, data: bytes) -> None:
        file.write(data[:2])
        seen.append(target.read_bytes())
        file.write(data[2:])

    monkeypatch.setattr(regular_files, "write_all", write_some)
    await put(tools, "f", b"newer")
    assert seen == [b"old"] and target.read_bytes() == b"newer"


async def test_wrong_pieces_are_refused(tools: RunnerTools, context: Context) -> None:
    await put(tools, "f", b"abc", key="k", offset=0)
    write = partial(refused, tools, "file_write", data_base64="")
    assert "would leave a gap" in (await write(path="f", key="k", offset=4))[1]
    assert "used for another file" in (await write(path="g", key="k", offset=0))[1]
    assert "its first piece is at 0" in (await write(path="g", key="other", offset=1))[1]
    assert "'end' is of a file with a key" in (await write(path="g", end="commit"))[1]
    assert "'end'" in (await write(path="g", key="k", end="later"))[1]
    assert await put(tools, "f", b"d", key="k", offset=3, end="commit") == 4


async def test_what_nobody_goes_on_with_is_removed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "IDLE_SECONDS", 0.05)
    tools = RunnerTools(context)
    await put(tools, "f", b"abc", key="k", offset=0)
    with anyio.fail_after(20):
        while names(context.workspace):
            await anyio.sleep(0.01)


async def test_the_end_of_the_runner_removes_what_is_on_its_way(tmp_path: Path) -> None:
    context = Context(workspace=tmp_path, home=tmp_path)
    async with context.jobs:
        await put(RunnerTools(context), "f", b"abc", key="k", offset=0)
        await anyio.wait_all_tasks_blocked()
    assert names(tmp_path) == []


def test_a_draft_lives_from_piece_to_piece(tmp_path: Path) -> None:
    now = [0.0]
    held = Drafts(Files(tmp_path), clock=lambda: now[0])
    held.write("old", "a", b"x", 0, None, None)
    now[0] = IDLE_SECONDS - 1
    held.write("new", "b", b"x", 0, None, None)
    held.write("old", "a", b"y", 1, None, None)
    now[0] += IDLE_SECONDS - 1
    assert held.sweep() == 1 and len(names(tmp_path)) == 2
    now[0] += 1
    assert held.sweep() is None and held.empty and names(tmp_path) == []
    with pytest.raises(Problem, match="nothing of it is here"):
        held.write("old", "a", b"z", 2, None, None)


def test_too_many_files_on_their_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MAX_OPEN", 1)
    held = Drafts(Files(tmp_path))
    held.write("one", "a", b"x", 0, None, None)
    with pytest.raises(Problem, match="1 files are on their way already"):
        held.write("two", "b", b"x", 0, None, None)
    held.write("one", "a", b"", 1, None, "commit")
    held.write("two", "b", b"x", 0, None, "commit")
    assert names(tmp_path) == ["a", "b"]


def test_a_write_that_fails_leaves_nothing_and_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def full(file: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    held = Drafts(Files(tmp_path))
    held.write("k", "f", b"x", 0, None, None)
    monkeypatch.setattr(regular_files, "write_all", full)
    with pytest.raises(Problem, match="no space"):
        held.write("k", "f", b"y", 1, None, None)
    with pytest.raises(Problem, match="no space"):
        Files(tmp_path).write("f", b"y", None, None)
    assert names(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("refusing", ["mkstemp", "replace"])
def test_a_file_that_cannot_be_replaced_is_written_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    """It is a mount, or stands in a directory of another user's."""
    target = tmp_path / "f"
    target.write_bytes(b"longer than the new one")
    inode = target.stat().st_ino
    make = regular_files.tempfile.mkstemp

    def mkstemp(prefix: str, dir: Path | None = None) -> tuple[int, str]:
        if dir is not None:
            raise PermissionError(13, "Permission denied")
        return make(prefix=prefix)

    def replace(source: str, destination: Path) -> None:
        raise OSError(16, "Device or resource busy")

    if refusing == "mkstemp":
        monkeypatch.setattr(regular_files.tempfile, "mkstemp", mkstemp)
    monkeypatch.setattr(regular_files.os, "replace", replace)
    assert Files(tmp_path).write("f", b"new", None, 0o600) == 3
    assert target.read_bytes() == b"new" and target.stat().st_ino == inode and names(tmp_path) == ["f"]
    with pytest.raises(Problem):
        Files(tmp_path).write("none before", b"new", None, None)
    assert names(tmp_path) == ["f"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    os.chown(tmp_path / "f", 12345, 12345)
    Files(tmp_path).write("f", b"new", None, None)
    found = (tmp_path / "f").stat()
    assert (found.st_uid, found.st_gid) == (12345, 12345)
