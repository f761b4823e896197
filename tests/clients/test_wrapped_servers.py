"""Servers that people have, under `ash wrap`: MCP's own from npm and PyPI, and the Inspector in front of one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.wrap.wrap_parts import words_of

pytestmark = needs_isolation
INSTALL_SECONDS = 300


@dataclass(frozen=True)
class Known:
    """A server and one call of it. `{place}` is a folder that it may write to."""

    words: str
    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    says: str = ""
    fails: bool = False


KNOWN = (
    Known("npx -y @modelcontextprotocol/server-filesystem {place}", "list_directory", {"path": "{place}"}, "here.txt"),
    Known("npx -y @modelcontextprotocol/server-everything", "echo", {"message": "hello"}, "hello"),
    Known("npx -y @modelcontextprotocol/server-memory", "read_graph", {}, "entities"),
    Known(
        "npx -y @modelcontextprotocol/server-sequential-thinking",
        "sequentialthinking",
        {"thought": "t", "nextThoughtNeeded": False, "thoughtNumber": 1, "totalThoughts": 1},
        "thoughtNumber",
    ),
    Known("uvx mcp-server-git --repository {place}", "git_status", {"repo_path": "{place}"}, "here.txt"),
    Known("uvx mcp-server-time", "get_current_time", {"timezone": "UTC"}, "UTC"),
    Known("uvx mcp-server-sqlite --db-path {place}/x.db", "list_tables", {}, "["),
    Known("uvx mcp-server-fetch", "fetch", {"url": "http://example.com/"}, "", fails=True),
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str, str]]:
    path = tmp_path_factory.mktemp("cache")
    yield {**os.environ, "XDG_CACHE_HOME": str(path)}
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "here.txt").write_text("text")
    subprocess.run(["git", "init", "-q", tmp_path], check=True, timeout=60)
    return tmp_path


@pytest.mark.anyio
@pytest.mark.extended
@pytest.mark.timeout(2 * INSTALL_SECONDS)
@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.words.split()[-1 if "/" in known.words else 1])
async def test_a_server_does_its_work_and_has_no_network(known: Known, place: Path, cache: dict[str, str]) -> None:
    if known.words.startswith("npx") and shutil.which("npm") is None:
        pytest.skip("npm is not installed")

    def filled(text: Any) -> Any:
        return text.format(place=place) if isinstance(text, str) else text

    command, *words = words_of(["--folder", f"{place}:rw"], *filled(known.words).split())
    # Clients wait for a server's first answer for less time than an installation may take.
    with anyio.fail_after(INSTALL_SECONDS):
        await anyio.run_process([command, *words], env=cache, stdin=subprocess.DEVNULL, check=False)
    transport = StdioTransport(command, words, env=cache, keep_alive=False)
    async with Client(transport, init_timeout=INSTALL_SECONDS, timeout=60) as client:
        assert known.tool in {tool.name for tool in await client.list_tools()}
        arguments = {name: filled(value) for name, value in known.arguments.items()}
        result = await client.call_tool_mcp(known.tool, arguments)
        assert result.is_error is known.fails and known.says in str(result.content), result


@pytest.mark.node
def test_the_inspector_calls_a_wrapped_server(node_bin: Path, tmp_path: Path) -> None:
    (tmp_path / "wrapped_tools.py").write_text(
        "from fastmcp import FastMCP\nserver = FastMCP('small')\n"
        "@server.tool\ndef twice(number: int) -> int:\n    return 2 * number\n"
        "server.run('stdio', show_banner=False)\n"
    )
    server = (sys.executable, str(tmp_path / "wrapped_tools.py"))
    done = subprocess.run(
        [
            *(
                node_bin / "mcp-inspector",
                "--cli",
                *words_of(["--folder", str(tmp_path)], *server),
            ),
            *("--method", "tools/call", "--tool-name", "twice", "--tool-arg", "number=21"),
            *("--connect-timeout", "60000"),
        ],
        env={**os.environ, "PATH": f"{node_bin}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["content"][0]["text"] == "42"
