"""A sandbox whose server was subverted: it can hurt nobody but itself, and cannot speak in the hive's name."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from ash_hub.app import open_hive
from ash_hub.settings import HubSettings
from ash_hub.testing.escapes import Bait, lay_bait
from ash_mcp import Hive
from ash_mcp.errors import AshError
from ash_mcp.sandbox import Sandbox
from tests.hub.backends.local.local_parts import needs_isolation

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, needs_isolation]

SOURCE = Path(__file__).with_name("hostile_runner.py")
RECIPE = """
name = "hostile"
description = "Answers as it likes."
server = {{ python = "hostile_runner:server" }}
env = {{ BAIT = "http://127.0.0.1:{port}/", HOSTILE = "1" }}
"""
MIB = 1024 * 1024


VERSION = "2026-07-28"
META = {
    "io.modelcontextprotocol/protocolVersion": VERSION,
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


@dataclass(frozen=True)
class Scene:
    url: str
    hive: Hive
    hostile: Sandbox
    quiet: Sandbox


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bait() -> Iterator[Bait]:
    with lay_bait() as laid:
        yield laid


@pytest.fixture(scope="module")
async def scene(anyio_backend: str, bait: Bait) -> AsyncGenerator[Scene]:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))
    recipe = folder / "recipes" / "hostile"
    recipe.mkdir(parents=True)
    (recipe / "recipe.toml").write_text(RECIPE.format(port=bait.port))
    shutil.copy(SOURCE, recipe)
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", recipe_dirs=(recipe.parent,))
    async with open_hive(settings) as served, Hive(served.url) as client:
        async with client.spawn("hostile") as hostile, client.spawn("echo") as quiet:
            yield Scene(served.url, client, hostile, quiet)
    shutil.rmtree(folder)


async def asked(scene: Scene, tool: str, **arguments: Any) -> httpx.Response:
    """Call a tool of the hive as a bare HTTP request."""
    params = {"name": tool, "arguments": arguments, "_meta": META}
    headers = {
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": VERSION,
        "mcp-method": "tools/call",
        "mcp-name": tool,
    }
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": params}
        return await client.post(scene.url, json=call, headers=headers)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_its_tool_list_stays_as_it_was_read_before_it_could_be_subverted(scene: Scene) -> None:
    assert (await scene.hostile.call("fine")).text == "fine"
    for _ in range(2):
        tools = {tool.name: tool.description for tool in await scene.hostile.tools()}
        assert "pwned" not in tools and tools["fine"] == "as it was"


BAD: Mapping[str, tuple[str | None, str]] = {
    "garbage": ("remote_protocol_error", "not HTTP"),
    "huge_head": ("remote_protocol_error", "head of the sandbox's answer is too long"),
    "endless": (None, ""),
    "one_endless_line": ("sandbox_refused", "the sandbox sent too much"),
    "redirect": ("remote_protocol_error", "redirect (307), which is never followed"),
    "status": ("sandbox_refused", "answered 503"),
    "hang_up": ("stream_broken", "broke before"),
}
"""Tools by the kind of failure that their caller gets, None for none, and what it says."""
LONGEST_LINE = 64 * MIB
"""The caller's own bound, which is in this process, too."""


@pytest.mark.parametrize("tool", BAD)
async def test_a_bad_answer_is_its_callers_failure_and_nobody_elses(scene: Scene, tool: str, bait: Bait) -> None:
    before = resident_bytes()
    kind, says = BAD[tool]
    with anyio.move_on_after(60 if kind else 1) as patience:
        with pytest.raises(AshError) as failed:
            await scene.hostile.call(tool)
        assert failed.value.kind == kind and says in str(failed.value)
        assert failed.value.kind != "hive_failure" and bait.secret not in str(failed.value)
    assert patience.cancelled_caught is (kind is None)
    assert resident_bytes() - before < 2 * LONGEST_LINE  # a buffer that grows is moved
    assert (await scene.quiet.call("echo", text="as ever")).structured == {"text": "as ever"}
    assert (await scene.hostile.call("fine")).text == "fine"


async def test_an_endless_answer_costs_the_hive_no_memory(scene: Scene) -> None:
    before = resident_bytes()
    with anyio.move_on_after(2):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(scene.hostile.call, "endless")
    assert resident_bytes() - before < 32 * MIB


async def test_what_it_says_of_its_own_failure_is_its_result_and_no_word_of_the_hive(scene: Scene) -> None:
    result = await scene.hostile.call("forged")
    assert result.is_error and result.text == "the hive failed"
    answer = await asked(scene, f"{scene.hostile.session}_forged")
    assert answer.headers["ash-origin"] == "sandbox"
    assert answer.headers["ash-nonce"] != "forged" and "ash-error" not in answer.headers
    assert not {"set-cookie", "www-authenticate"} & set(answer.headers)


async def test_an_answer_under_another_id_reaches_nobody_but_its_caller(scene: Scene) -> None:
    told: list[str] = []

    async def ask() -> None:
        told.append((await scene.hostile.call("fine")).text)

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(ask)
            group.start_soon(scene.hostile.call, "other_id")
    assert told == ["fine"] * 10


async def test_an_endless_file_or_resource_is_refused_and_costs_no_memory(scene: Scene) -> None:
    before = resident_bytes()
    for uri in (f"sandbox://{scene.hostile.session}/x", "file:///x"):
        answer = await asked(scene, "read_resource", session=scene.hostile.session, uri=uri)
        assert '"isError":true' in answer.text and "is larger than" in answer.text
    assert resident_bytes() - before < 64 * MIB


async def test_its_runner_cannot_be_read_by_what_runs_beside_it(scene: Scene) -> None:
    script = """
for p in /proc/[0-9]*; do
  case "$(tr '\\0' ' ' <$p/cmdline)" in
    *"-m ash_recipes.runner ") echo found; cat $p/environ; head -c 1 $p/mem; readlink $p/fd/* ;;
  esac
done"""
    done = await scene.quiet.exec(script)
    assert done.stdout == "found\n" * 2  # the first process and the runner
    assert done.stderr.count("Permission denied") == 4


async def test_a_file_that_changes_into_a_link_leads_nowhere_but_inside(scene: Scene, bait: Bait) -> None:
    """Reads and writes of the hive race against renames of links; the runner does them inside, where links end."""
    box = scene.quiet
    races = f"""
cd /workspace; mkdir -p d e; echo inside >d/note; echo inside >file
ln -sfn {Path(bait.file).parent} f; ln -sf {bait.file} link; ln -sf /proc/1/root{bait.file} root
while true; do
  ln -sf {bait.file} a; mv -T a note 2>/dev/null; cp file b; mv -T b note
  mv -T d g 2>/dev/null; ln -sfn {Path(bait.file).parent} d; rm -f d; mv -T g d 2>/dev/null
done"""
    job = await box.background(races)
    seen: set[bytes] = set()
    for number in range(12):
        for path in ("note", "d/note", "link", "root", "f/secret", "d/secret"):
            with contextlib.suppress(AshError):
                seen.add(await box.files.read_bytes(path))
            seen.add(
                (
                    await asked(scene, "read_resource", session=box.session, uri=f"sandbox://{box.session}/{path}")
                ).content
            )
        with contextlib.suppress(AshError):
            await box.files.write("note", f"written {number}")
    await job.stop(grace_seconds=0)
    assert seen and not any(bait.secret.encode() in content for content in seen)
    assert await anyio.Path(bait.file).read_text() == bait.secret
