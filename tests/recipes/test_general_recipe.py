"""The recipe `general` as a client sees it, through a real runner."""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections.abc import Generator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from mcp.client.client import Client
from mcp_types import CallToolResult, TextContent

from ash_recipes import echo, general
from ash_recipes.general.network import require_network
from ash_recipes.runner.context import current
from ash_recipes.runner.problems import Problem
from tests.recipes.runner_parts import GENERAL, Runner, running

pytestmark = pytest.mark.anyio

T = "terminal-controller_"


@pytest.fixture(scope="module")
def runner() -> Generator[Runner]:
    with running(GENERAL, general.RECIPE["env"], port=True) as runner:
        yield runner


async def call(runner: Runner, name: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """Return the text and the object of a call that succeeds, checked by the client against its schema."""
    async with runner.client("legacy") as client:
        await client.list_tools()
        return _parts(await client.call_tool(name, arguments), error=False)


async def refused(runner: Runner, name: str, **arguments: Any) -> tuple[str, str]:
    async with runner.client("2026-07-28") as client:
        text, shape = _parts(await client.call_tool(name, arguments), error=True)
    assert text == f"Error: {shape['error']['message']}"
    return shape["error"]["kind"], shape["error"]["message"]


def _parts(result: CallToolResult, *, error: bool) -> tuple[str, dict[str, Any]]:
    (block,) = result.content
    assert isinstance(block, TextContent) and result.is_error is error, block
    assert result.structured_content is not None
    return block.text, result.structured_content


async def test_tools_have_the_names_and_arguments_that_callers_know(runner: Runner) -> None:
    async with runner.client("2026-07-28") as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    arguments = {name: list(tool.input_schema["properties"]) for name, tool in tools.items()}
    assert (
        arguments.items()
        >= {
            f"{T}execute_command": ["command", "timeout", "user"],
            f"{T}get_command_history": ["count"],
            f"{T}get_current_directory": [],
            f"{T}change_directory": ["path"],
            f"{T}list_directory": ["path"],
            f"{T}write_file": ["path", "content", "mode"],
            f"{T}read_file": ["path", "start_row", "end_row", "as_json"],
            f"{T}insert_file_content": ["path", "content", "row", "rows"],
            f"{T}delete_file_content": ["path", "row", "rows", "substring"],
            f"{T}update_file_content": ["path", "content", "row", "rows", "substring"],
            "fetch_fetch": ["url", "max_length", "start_index", "raw"],
        }.items()
    )
    assert {name for name in tools if name.startswith("ddgs")} == {
        f"ddgs_search_mcp_search{kind}" for kind in ("", "_images", "_videos", "_news")
    }
    for tool in tools.values():
        assert tool.title and tool.description and len(tool.description) < 1000 and tool.output_schema
        assert tool.annotations is not None and None not in tool.annotations.model_dump().values()
        assert tool.description == inspect.cleandoc(tool.description)
    reads = {name for name, tool in tools.items() if tool.annotations and tool.annotations.read_only_hint}
    assert f"{T}execute_command" not in reads and f"{T}read_file" in reads and f"{T}stop_job" not in reads


async def test_a_command_tells_text_and_facts(runner: Runner) -> None:
    text, shape = await call(runner, f"{T}execute_command", command="echo out; echo err >&2")
    assert text.startswith("Command executed successfully (duration: 0:00:0") and "Output:\nout\n" in text
    assert "Warnings/Info:\nerr" in text and (shape["stdout"], shape["exit_code"]) == ("out\n", 0)
    text, shape = await call(runner, f"{T}execute_command", command="echo out; exit 3")
    assert text.startswith("Command execution failed (duration: ") and text.endswith("Return code: 3")
    text, shape = await call(runner, f"{T}execute_command", command="true")
    assert "Command had no output." in text


async def test_a_timeout_is_told(runner: Runner) -> None:
    command = "echo part; sleep 60"
    for seconds in (0.3, 3, 30):  # on a busy machine it may not begin in the first
        text, shape = await call(runner, f"{T}execute_command", command=command, timeout=seconds)
        assert f"Command timed out after {seconds} seconds" in text and shape["timed_out"]
        if "part" in text:
            break
    assert "part" in text


async def test_a_long_output_says_where_the_whole_is(runner: Runner) -> None:
    text, shape = await call(runner, f"{T}execute_command", command="seq 100000")
    assert shape["truncated"] and shape["stdout_bytes"] == 588_895 and len(text) < 40_000
    assert f"the whole output is in {shape['output_file']}" in text
    assert os.stat(shape["output_file"]).st_size == 588_895
    text, shape = await call(runner, f"{T}execute_command", command="head -c 400000 /dev/urandom")
    assert len(json.dumps([text, shape])) < 1_000_000


async def test_the_working_directory_lasts_for_all_tools(runner: Runner) -> None:
    await call(runner, f"{T}execute_command", command="mkdir -p here/deeper && cd here")
    assert (await call(runner, f"{T}get_current_directory"))[0] == f"{runner.workspace}/here"
    await call(runner, f"{T}write_file", path="f.txt", content="x")
    text, shape = await call(runner, f"{T}list_directory")
    assert "📁 deeper/" in text and "📄 f.txt" in text and shape["total"] == 2
    text, _ = await call(runner, f"{T}change_directory", path="..")
    assert text == f"Switched to directory: {runner.workspace}"
    text, shape = await call(runner, f"{T}get_command_history", count=1)
    assert "[✓]" in text and "mkdir -p here/deeper" in text and len(shape["commands"]) == 1


async def test_a_file_is_written_read_and_changed_by_rows(runner: Runner) -> None:
    path = "rows/file.txt"
    text, shape = await call(runner, f"{T}write_file", path=path, content="zero\none\ntwo")
    assert text == f"Successfully wrote 13 bytes to '{path}' in overwrite mode." and shape["size"] == 13
    await call(runner, f"{T}write_file", path=path, content="three", mode="append")
    assert (await call(runner, f"{T}read_file", path=path))[0] == "zero\none\ntwo\nthree\n"
    assert (await call(runner, f"{T}read_file", path=path, start_row=1, end_row=2))[0] == "Line 1: one\nLine 2: two\n"
    assert (await call(runner, f"{T}read_file", path=path, start_row=3))[0] == "Line 3: three\n"
    text, shape = await call(runner, f"{T}insert_file_content", path=path, content="new", row=1)
    assert text == f"Successfully inserted content at row 1 in '{path}'." and shape["total_rows"] == 5
    text, _ = await call(runner, f"{T}delete_file_content", path=path, rows=[0, 2])
    assert text == f"Successfully deleted rows [0, 2] from '{path}'."
    text, _ = await call(runner, f"{T}update_file_content", path=path, content="TWO", substring="two")
    assert "Successfully updated 'two' in 1 rows ([1])" in text
    assert (await call(runner, f"{T}read_file", path=path))[0] == "new\nTWO\nthree\n"


async def test_json_is_written_and_read(runner: Runner) -> None:
    await call(runner, f"{T}write_file", path="data.json", content={"a": ["é"]})
    assert json.loads((await call(runner, f"{T}read_file", path="data.json", as_json=True))[0]) == {"a": ["é"]}
    await call(runner, f"{T}write_file", path="bad.json", content="{")
    assert (await refused(runner, f"{T}read_file", path="bad.json", as_json=True))[0] == "bad_request"


async def test_bytes_that_are_not_utf8_survive_an_edit(runner: Runner) -> None:
    (runner.workspace / "raw").write_bytes(b"a\xff\nb\n")
    await call(runner, f"{T}update_file_content", path="raw", content="c", row=1)
    assert (runner.workspace / "raw").read_bytes() == b"a\xff\nc\n"


async def test_a_huge_file_is_read_in_part_and_says_how_to_go_on(runner: Runner) -> None:
    (runner.workspace / "huge").write_text("".join(f"row {number}\n" for number in range(200_000)))
    text, shape = await call(runner, f"{T}read_file", path="huge")
    following = shape["next_row"]
    assert len(text) < 250_000 and f"start_row={following}" in text
    text, _ = await call(runner, f"{T}read_file", path="huge", start_row=following, end_row=following + 1)
    assert text == f"Line {following}: row {following}\nLine {following + 1}: row {following + 1}\n"
    (runner.workspace / "wide").write_text("x" * 3_000_000)
    text, shape = await call(runner, f"{T}read_file", path="wide")
    assert len(text) < 250_000 and shape["next_row"] == 1


async def test_a_background_job_is_started_fed_read_and_stopped(runner: Runner) -> None:
    _, started = await call(runner, f"{T}start_job", command="read line; echo got $line; sleep 60", stdin=True)
    job = started["job"]
    await call(runner, f"{T}write_job", job=job, text="hello\n")
    text, shape = await call(runner, f"{T}read_job", job=job, wait=5)
    assert shape["output"] == "got hello\n" and shape["state"] == "running" and "got hello" in text
    text, shape = await call(runner, f"{T}stop_job", job=job)
    assert text == f"{job} has ended with exit code 143." and shape["state"] == "exited"
    assert job in (await call(runner, f"{T}list_jobs"))[0]
    assert (await refused(runner, f"{T}write_job", job=job, text="x"))[0] == "bad_request"


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "words"),
    [
        ("execute_command", {}, "bad_request", "'command' is missing"),
        ("execute_command", {"command": 5}, "bad_request", "'command'"),
        ("execute_command", {"command": "true", "timeout": 0}, "bad_request", "greater than 0"),
        ("execute_command", {"command": "true", "tmeout": 1}, "bad_request", "known are: command, timeout"),
        ("change_directory", {"path": "nowhere"}, "file_not_found", "nowhere"),
        ("list_directory", {"path": "nowhere"}, "file_not_found", "nowhere"),
        ("read_file", {"path": "nowhere"}, "file_not_found", "nowhere"),
        ("read_file", {"path": "."}, "is_a_directory", "directory"),
        ("read_file", {"path": "/dev/zero"}, "bad_request", "regular"),
        ("read_file", {"path": "/etc/passwd", "start_row": 99_999}, "bad_request", "out of range"),
        ("read_file", {"path": "/etc/passwd", "start_row": 2, "end_row": 1}, "bad_request", "end_row"),
        ("write_file", {"path": "x", "content": "y", "mode": "replace"}, "bad_request", "'mode'"),
        ("write_file", {"path": "/proc/nothing/x", "content": "y"}, "file_not_found", "/proc"),
        ("insert_file_content", {"path": "x", "content": "y", "row": 1, "rows": [2]}, "bad_request", "not both"),
        ("delete_file_content", {"path": "nowhere", "row": 1}, "file_not_found", "nowhere"),
        ("update_file_content", {"path": "/etc/hostname", "content": "", "row": -1}, "bad_request", "start at 0"),
        ("read_job", {"job": "job-999"}, "job_not_found", "job-999"),
        ("stop_job", {"job": "job-999"}, "job_not_found", "job-999"),
    ],
)
async def test_bad_input_is_told(runner: Runner, name: str, arguments: dict[str, Any], kind: str, words: str) -> None:
    found, message = await refused(runner, f"{T}{name}", **arguments)
    assert found == kind and words in message and "pydantic" not in message
    assert not (runner.workspace / "x").exists()


def test_without_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo")])
    with pytest.raises(Problem, match="network: none, as its spawn or its recipe asked") as raised:
        require_network()
    assert raised.value.kind == "no_network" and "spawn one with network=" in raised.value.message
    less = replace(current(), network_note="network: none, because this hive allows none")
    monkeypatch.setattr("ash_recipes.general.network.current", lambda: less)
    with pytest.raises(Problem, match="this sandbox has network: none, because this hive allows none, so nothing"):
        require_network()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    require_network()


class Proxy(BaseHTTPRequestHandler):
    """Plays the egress proxy and all of the web behind it."""

    pages: ClassVar[dict[str, tuple[int, str, str]]] = {
        "http://a.test/robots.txt": (200, "text/plain", "User-agent: *\nDisallow: /private"),
        "http://a.test/": (
            200,
            "text/html",
            "<html><script>no()</script><nav>menu</nav><main><h1>Title</h1><p>"
            + "word " * 2000
            + "</p></main></html>",
        ),
        "http://a.test/plain": (200, "text/plain", "just text"),
        "http://a.test/moved": (302, "http://a.test/plain", ""),
        "http://a.test/round": (302, "http://a.test/round", ""),
        "http://a.test/private/x": (200, "text/plain", "hidden"),
        "http://a.test/away": (302, "ftp://a.test/", ""),
    }

    def do_GET(self) -> None:
        status, kind, body = self.pages.get(self.path, (404, "text/plain", "nothing"))
        self.send_response(status)
        self.send_header("location" if status == 302 else "content-type", kind)
        self.send_header("content-length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def online() -> Generator[Runner]:
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{proxy.server_port}"
    with running(GENERAL, {"HTTP_PROXY": address, "HTTPS_PROXY": address, "NO_PROXY": ""}, port=True) as runner:
        yield runner
    proxy.shutdown()
    proxy.server_close()


async def test_a_page_comes_as_markdown_in_pieces_through_the_proxy(online: Runner) -> None:
    text, shape = await call(online, "fetch_fetch", url="http://a.test/", max_length=100)
    assert text.startswith("Contents of http://a.test/:\n# Title\n\nword word")
    assert shape["next_index"] == 100 and "start_index=100" in text and "menu" not in text and "no()" not in text
    _, rest = await call(online, "fetch_fetch", url="http://a.test/", start_index=100, max_length=999_999)
    assert rest["next_index"] is None and 100 + len(rest["content"]) == shape["total_length"]
    text, _ = await call(online, "fetch_fetch", url="http://a.test/", start_index=10**6)
    assert "No more content available" in text
    assert "<script>" in (await call(online, "fetch_fetch", url="http://a.test/", raw=True))[0]


async def test_redirects_are_followed_and_named(online: Runner) -> None:
    text, shape = await call(online, "fetch_fetch", url="http://a.test/moved")
    assert shape["url"] == "http://a.test/plain" and "just text" in text and "cannot be simplified" in text


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("http://a.test/nothing", "fetch_failed", "status 404"),
        ("http://a.test/round", "fetch_failed", "too many redirects"),
        ("http://a.test/private/x", "fetch_failed", "robots.txt forbids"),
        ("http://a.test/away", "bad_request", "no address of a web page"),
        ("file:///etc/passwd", "bad_request", "no address of a web page"),
        ("http://[", "bad_request", "no address of a web page"),
        ("a.test", "bad_request", "no address of a web page"),
        ("https://a.test/", "fetch_failed", "could not be fetched"),
    ],
)
async def test_a_failed_fetch_says_why(online: Runner, url: str, kind: str, words: str) -> None:
    found, message = await refused(online, "fetch_fetch", url=url)
    assert found == kind and words in message


async def test_a_failed_search_says_so(online: Runner) -> None:
    kind, message = await refused(online, "ddgs_search_mcp_search", query="x", backend="duckduckgo")
    assert kind == "search_failed" and message


def test_recipes_are_plain_data() -> None:
    for recipe in (general.RECIPE, echo.RECIPE):
        assert json.loads(json.dumps(recipe)) == recipe


async def test_the_recipe_serves_without_a_runner_too() -> None:
    from ash_recipes.general.server import build

    async with Client(build()._mcp_server) as client:  # pyright: ignore[reportPrivateUsage]
        assert len((await client.list_tools()).tools) > 15
