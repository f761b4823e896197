"""Uploads are whole or not at all, and lists are complete or fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from ash_mcp import Sandbox, SandboxRefused, StreamBroken, files
from ash_mcp.files import CHUNK_BYTES
from ash_mcp.wire import ORIGIN_SANDBOX
from tests.ash_mcp.twin import Script, TwinHive, request_id, whole_answer

pytestmark = pytest.mark.anyio

LARGE = os.urandom(2 * CHUNK_BYTES + 17)


def inside(twin: TwinHive, box: Sandbox) -> Path:
    return twin.boxes[box.id].runner.workspace


async def test_reader_sees_the_old_or_the_new_file_while_it_is_written(box: Sandbox, twin: TwinHive, tmp_path: Path):
    await box.files.write("f", "old")
    seen: list[bytes] = []

    def look(done: int, total: int | None) -> None:
        seen.append((inside(twin, box) / "f").read_bytes())

    (tmp_path / "large").write_bytes(LARGE)
    await box.files.upload(tmp_path / "large", "f", on_bytes=look)
    assert seen == [b"old"] * 3 and (inside(twin, box) / "f").read_bytes() == LARGE


async def test_interrupted_upload_leaves_nothing_and_the_old_file(box: Sandbox, twin: TwinHive, tmp_path: Path):
    await box.files.write("f", "old")
    (tmp_path / "large").write_bytes(LARGE)
    with anyio.CancelScope() as scope:
        await box.files.upload(tmp_path / "large", "f", on_bytes=lambda done, total: scope.cancel())
    assert scope.cancelled_caught
    assert twin.boxes[box.id].runner.drafts == {}
    assert [path.name for path in inside(twin, box).iterdir()] == ["f"]
    assert await box.files.read("f") == "old"


async def test_write_that_fails_in_its_middle_leaves_the_old_file(box: Sandbox, twin: TwinHive):
    await box.files.write("f", "old")

    def breaks(request: httpx.Request) -> None:
        raise httpx.ReadError("reset")

    twin.scripts.append(lambda request: None)
    twin.scripts.extend([breaks] * 4)
    with pytest.raises(StreamBroken):
        await box.files.write("f", LARGE)
    assert await box.files.read("f") == "old" and twin.boxes[box.id].runner.drafts == {}


async def test_file_that_fits_in_one_call_is_one_call(box: Sandbox, twin: TwinHive):
    before = len(twin.seen)
    await box.files.write("f", LARGE[:CHUNK_BYTES])
    assert len(twin.seen) == before + 1


async def test_directory_of_many_pages_is_listed_whole(box: Sandbox, twin: TwinHive):
    for number in range(25):
        (inside(twin, box) / f"{number:02}").touch()
    twin.boxes[box.id].runner.list_limit = 10
    assert [entry.name for entry in await box.files.list()] == [f"{number:02}" for number in range(25)]


ENTRY = {"name": "a", "type": "file", "size": 0, "mode": 0o644, "modified_at": 0}


def lists(**shape: Any) -> Script:
    result = {"structuredContent": shape, "isError": False}
    return lambda request: whole_answer(request_id(request), result, ORIGIN_SANDBOX)


async def test_list_that_is_cut_without_a_way_on_is_no_list(box: Sandbox, twin: TwinHive):
    twin.scripts.append(lists(entries=[ENTRY], total=5000, truncated=True))
    with pytest.raises(SandboxRefused, match="does not come to the end"):
        await box.files.list()


async def test_list_without_end_is_given_up(box: Sandbox, twin: TwinHive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MOST_ENTRIES", 3)
    twin.scripts.extend([lists(entries=[ENTRY, ENTRY], truncated=True, next_cursor="on")] * 9)
    with pytest.raises(SandboxRefused, match="after 4 entries"):
        await box.files.list()
    twin.scripts.append(lists(entries=[], truncated=True, next_cursor="on"))
    twin.scripts.rotate(1)
    with pytest.raises(SandboxRefused, match="after 0 entries"):
        await box.files.list()
