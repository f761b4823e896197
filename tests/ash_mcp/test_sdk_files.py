"""The files of a sandbox, on any hive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ash_mcp import FileError, FileNotFound, Hive, IsADirectory, Sandbox
from ash_mcp.files import CHUNK_BYTES
from tests.ash_mcp.twin import TwinHive

pytestmark = pytest.mark.anyio


async def test_text_and_bytes_come_back_as_written(box: Sandbox):
    assert await box.files.write("notes.txt", "hällo\n") == 7
    assert await box.files.read("notes.txt") == "hällo\n"
    await box.files.write("new/dir/raw", b"\x00\xff")
    assert await box.files.read_bytes("new/dir/raw") == b"\x00\xff"
    with pytest.raises(UnicodeDecodeError):
        await box.files.read("new/dir/raw")
    await box.files.write("notes.txt", "")
    assert await box.files.read("notes.txt") == ""


async def test_file_larger_than_one_call_comes_whole(box: Sandbox):
    data = os.urandom(2 * CHUNK_BYTES + 17)
    await box.files.write("large", data, mode=0o700)
    assert await box.files.read_bytes("large") == data
    assert (await box.files.stat("large")).mode == 0o700


async def test_directories_are_listed_made_moved_and_removed(box: Sandbox):
    await box.files.mkdir("a/b")
    await box.files.mkdir("a/b")
    await box.files.write("a/b/one", "1")
    (entry,) = await box.files.list("a/b")
    assert (entry.name, entry.path, entry.type, entry.size) == ("one", "a/b/one", "file", 1)
    await box.files.move("a/b/one", "two")
    assert (await box.files.stat("a/b")).type == "directory"
    assert await box.files.exists("two") and not await box.files.exists("a/b/one")
    with pytest.raises(FileError):
        await box.files.remove("a")
    await box.files.remove("a", recursive=True)
    await box.files.remove("two")
    assert not await box.files.exists("a") and not await box.files.exists("two")


async def test_failures_are_ours_and_the_built_in_ones_and_only_ever_trainable(box: Sandbox):
    with pytest.raises(FileNotFoundError) as missing:
        await box.files.read("missing")
    assert isinstance(missing.value, FileNotFound)
    assert missing.value.trainable and not missing.value.retryable
    await box.files.mkdir("folder")
    with pytest.raises(IsADirectory):
        await box.files.read("folder")


async def test_local_files_are_copied_both_ways(box: Sandbox, tmp_path: Path):
    source, back = tmp_path / "source", tmp_path / "back"
    data = os.urandom(CHUNK_BYTES + 5)
    source.write_bytes(data)
    source.chmod(0o755)
    sent: list[tuple[int, int | None]] = []
    assert await box.files.upload(source, "up/loaded", on_bytes=lambda done, total: sent.append((done, total))) == len(
        data
    )
    assert sent == [(CHUNK_BYTES, len(data)), (len(data), len(data))]
    assert (await box.files.stat("up/loaded")).mode == 0o755
    assert await box.files.download("up/loaded", back) == len(data)
    assert back.read_bytes() == data


async def test_empty_local_file_is_copied(box: Sandbox, tmp_path: Path):
    (tmp_path / "empty").touch()
    assert await box.files.upload(tmp_path / "empty", "empty") == 0
    assert await box.files.download("empty", tmp_path / "back") == 0
    assert (tmp_path / "back").read_bytes() == b""


async def test_download_that_fails_leaves_nothing_and_keeps_what_was_there(box: Sandbox, tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kept").write_text("old")
    with pytest.raises(FileNotFound):
        await box.files.download("missing", folder / "kept")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("kept", "old")]


async def test_pieces_shorter_than_asked_for_are_put_together(hive: Hive, twin: TwinHive):
    async with hive.spawn() as box:
        twin.boxes[box.id].runner.read_limit = 3
        await box.files.write("seven", "1234567")
        assert await box.files.read("seven") == "1234567"
