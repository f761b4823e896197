"""Results that are too long for an answer, by a real runner: what is left of them, and that all of it is in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import pytest
from mcp_types import CallToolResult, ResourceLink, TextContent

from ash_recipes.runner.large_results import KEPT_FILES, LargeResults
from tests.recipes.runner_parts import HERE, Runner, running

pytestmark = pytest.mark.anyio

MOST: Final = 20_000
ERAS: Final = ("legacy", "auto")


@pytest.fixture(scope="module", params=["python", "stdio"])
def verbose(request: pytest.FixtureRequest) -> Generator[Runner]:
    ways = {
        "python": {"python": "verbose_server:server"},
        "stdio": {"stdio": {"command": [sys.executable, str(HERE / "verbose_server.py")]}},
    }
    with running(ways[request.param], port=True, config={"result_bytes": MOST}) as runner:
        yield runner
        runner.stop()


def links(result: CallToolResult) -> list[tuple[ResourceLink, bytes]]:
    """Return the links of a result, with what is in the files."""
    found = [block for block in result.content if isinstance(block, ResourceLink)]
    return [(link, Path(f"/{link.uri.removeprefix('sandbox://sbx-test//')}").read_bytes()) for link in found]


def texts(result: CallToolResult) -> Sequence[str]:
    return [block.text for block in result.content if isinstance(block, TextContent)]


def size(result: CallToolResult) -> int:
    return len(result.model_dump_json(by_alias=True, exclude_none=True))


@pytest.mark.parametrize("mode", ERAS)
async def test_a_long_text_is_answered_with_its_head_its_size_and_its_link(verbose: Runner, mode: str) -> None:
    async with verbose.client(mode) as client:
        result = await client.call_tool("plain", {"characters": 200_000})
        assert size(result) < MOST and not result.is_error
        ((link, kept),) = links(result)
        assert (link.size, link.mime_type) == (len(kept), "text/plain")
        assert len(kept.decode()) == 200_000
        head, said = texts(result)
        assert 500 < len(head) and kept.decode().startswith(head)
        assert "of 200000 characters" in said and f"{len(kept)} bytes" in said


@pytest.mark.parametrize("mode", ERAS)
async def test_structured_content_keeps_its_shape_and_passes_the_clients_check_of_it(
    verbose: Runner, mode: str
) -> None:
    async with verbose.client(mode) as client:
        await client.list_tools()  # the client checks results by what is listed
        result = await client.call_tool("rows", {"count": 5000})
        assert size(result) < MOST
        structured: Any = result.structured_content
        assert structured["kind"] == "rows" and structured["rows"][0] == {"number": 0, "text": "row 0"}
        assert 0 < len(structured["rows"]) < 5000
        whole = {link.mime_type: kept for link, kept in links(result)}
        assert len(json.loads(whole["application/json"])["rows"]) == 5000
        assert json.loads(whole["text/plain"]) == json.loads(whole["application/json"])


async def test_what_could_only_lose_keys_stays_whole(verbose: Runner) -> None:
    async with verbose.client("auto") as client:
        result = await client.call_tool("keys", {"count": 3000})
        structured = cast("dict[str, Any]", result.structured_content)
        assert len(structured) == 3000
        assert [link.mime_type for link, _ in links(result)] == ["text/plain"]


async def test_bytes_become_a_link_alone(verbose: Runner) -> None:
    async with verbose.client("auto") as client:
        result = await client.call_tool("picture", {"size": 50_000})
        ((link, kept),) = links(result)
        assert (link.mime_type, kept, link.uri.endswith(".png")) == ("image/png", bytes(50_000), True)
        assert "image of type image/png" in texts(result)[0]


async def test_a_long_failure_is_shortened_and_stays_one(verbose: Runner) -> None:
    async with verbose.client("auto") as client:
        result = await client.call_tool("fail", {"characters": 100_000})
        assert result.is_error and size(result) < MOST and len(links(result)) == 1


async def test_what_fits_passes_as_it_is(verbose: Runner) -> None:
    before = len(list((verbose.home / ".ash" / "results").glob("*")))
    async with verbose.client("auto") as client:
        for tool, arguments in (
            ("plain", {"characters": 9_000}),
            ("rows", {"count": 50}),
            ("picture", {"size": 9_000}),
        ):
            result = await client.call_tool(tool, arguments)
            assert links(result) == [] and len(result.content) == 1
    assert len(list((verbose.home / ".ash" / "results").glob("*"))) == before


def result_of(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], "isError": False}


async def test_the_oldest_files_go(tmp_path: Path) -> None:
    results = LargeResults(4096, tmp_path / "results", "sbx")
    for number in range(KEPT_FILES + 5):
        await results.fitting(result_of(f"{number} {'x' * 10_000}"))
    assert len(list((tmp_path / "results").iterdir())) == KEPT_FILES


async def test_what_a_command_leaves_among_the_files_keeps_no_result_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "result-link").symlink_to(tmp_path / "nowhere")
    (folder / "result-folder").mkdir()
    answer = await LargeResults(4096, folder, "sbx").fitting(result_of("x" * 10_000))
    assert len(str(answer)) < 4096 and len(list(folder.iterdir())) == 3


async def test_a_disk_that_takes_nothing_leaves_the_result_whole(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where the folder would be")
    whole = result_of("x" * 10_000)
    assert await LargeResults(4096, tmp_path / "results", "sbx").fitting(whole) is whole


async def test_without_a_bound_every_result_is_whole(tmp_path: Path) -> None:
    whole = result_of("x" * 10_000_000)
    assert await LargeResults(0, tmp_path, "sbx").fitting(whole) is whole
