"""Directories of any size, page by page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ash_recipes.runner import files as runner_files
from ash_recipes.runner.context import Context
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call, refused

pytestmark = pytest.mark.anyio


async def listed(tools: RunnerTools, path: str, between: Callable[[], None] = lambda: None) -> list[str]:
    """Follow the cursors to the end, and do something between any two pages."""
    found: list[str] = []
    more: dict[str, Any] = {}
    while True:
        page = await call(tools, "file_list", path=path, **more)
        found += [entry["name"] for entry in page["entries"]]
        assert page["truncated"] == ("next_cursor" in page)
        if not page["truncated"]:
            return found
        between()
        more = {"cursor": page["next_cursor"]}


@pytest.fixture
def many(context: Context) -> Path:
    folder = context.workspace / "many"
    folder.mkdir()
    for number in range(6000):
        (folder / f"{number:05}").touch()
    return folder


async def test_every_entry_comes_once_and_in_order(tools: RunnerTools, many: Path) -> None:
    assert await listed(tools, "many") == sorted(os.listdir(many))


async def test_what_stays_is_listed_once_whatever_changes_between_pages(
    tools: RunnerTools, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_files, "LIST_BYTES", 40_000)
    stays = sorted(os.listdir(many))[::2]
    passing = iter(sorted(os.listdir(many))[1::2])
    rounds = iter(range(100))

    def change() -> None:
        for _ in range(40):
            os.unlink(many / next(passing))
        number = next(rounds)
        (many / f"00000-{number}").touch()
        (many / f"zzz-{number}").touch()

    found = await listed(tools, "many", change)
    assert [name for name in found if name in set(stays)] == stays
    assert len(found) == len(set(found)) and next(rounds) > 10


async def test_names_that_are_no_text_are_passed_too(
    tools: RunnerTools, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        (context.workspace / os.fsdecode(bytes([0x80 + number]) * 200)).touch()
    monkeypatch.setattr(runner_files, "LIST_BYTES", 5000)
    assert len(await listed(tools, ".")) == 30


async def test_a_page_says_how_many_there_are_and_is_an_answer_that_clients_take(
    tools: RunnerTools, many: Path
) -> None:
    result = await tools.call("ash_file_list", {"path": "many"})
    shape = result["structuredContent"]
    assert shape["total"] == 6000 and len(json.dumps(result)) < 1_000_000
    assert result["content"][0]["text"].endswith("\n[200 of 6000 entries shown]")


async def test_a_cursor_that_no_list_gave_is_refused(tools: RunnerTools) -> None:
    kind, message = await refused(tools, "file_list", path=".", cursor="é")
    assert kind == "bad_request" and "cursor" in message
