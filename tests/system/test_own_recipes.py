"""Recipes from a directory, through a real hive: a Python server, a stdio server of another era, and broken ones."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest
from mcp.client.client import Client

from ash_hub.app import open_hive
from ash_hub.settings import HubSettings
from ash_mcp import Hive
from ash_mcp.errors import StartFailed
from tests.recipes.mcp_callers import Person, text

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

ROOT: Final = Path(__file__).parents[2]
STDIO: Final = ROOT / "tests" / "recipes" / "legacy_server.py"
BROKEN: Final = {
    "missing": 'server = { python = "nothing:server" }',
    "silent": 'server = { stdio = { command = ["sh", "-c", "echo it broke >&2; exit 3"] } }',
    "absent": 'server = { stdio = { command = ["no-such-program"] } }',
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def url(anyio_backend: str) -> AsyncGenerator[str]:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    recipes = folder / "recipes"
    _write_recipes(recipes)
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", recipe_dirs=(recipes,))
    async with open_hive(settings) as served:
        yield served.url
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def hive(url: str) -> AsyncGenerator[Hive]:
    async with Hive(url) as client:
        yield client


def _write_recipes(folder: Path) -> None:
    readme = (ROOT / "recipes" / "README.md").read_text()
    (code,), (data, *_) = (
        re.findall(r"```python\n(.*?)```", readme, re.S),
        re.findall(r"```toml\n(.*?)```", readme, re.S),
    )
    _write(folder / "dice", data, {"dice.py": code})
    stdio = 'name = "old"\ndescription = "Speaks stdio."\n'
    stdio += 'server = { stdio = { command = ["python3", "/opt/recipe/server.py", "2025-06-18"] } }\n'
    _write(folder / "old", stdio, {"server.py": STDIO.read_text()})
    for name, server in BROKEN.items():
        _write(folder / name, f'name = "{name}"\ndescription = "Broken."\nstart_timeout_seconds = 10\n{server}\n', {})


def _write(folder: Path, data: str, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(data)
    for name, content in files.items():
        (folder / name).write_text(content)


async def test_the_recipe_of_the_readme_is_spawned_from_its_directory(hive: Hive) -> None:
    async with hive.spawn("dice", env={"WHO": "you"}) as box:
        assert (await box.call("roll", sides=1)).structured == {"value": 1}
        assert (await box.exec("echo $WHO; ls /opt/recipe")).stdout.split() == ["you", "dice.py", "recipe.toml"]


async def test_a_stdio_server_of_the_handshake_era_answers_callers_of_the_other(hive: Hive) -> None:
    async with hive.spawn("old", env={"WHO": "you"}) as box:
        assert "whoami" in [tool.name for tool in await box.tools()]
        assert (await box.call("whoami")).text == "you"
        assert (await box.exec("echo hi")).stdout == "hi\n"


@pytest.mark.parametrize(
    ("door", "era"),
    [
        ("namespaced", "legacy"),
        ("call", "2026-07-28"),
        ("namespaced", "2026-07-28"),
        ("call", "legacy"),
        ("direct", "legacy"),
        ("direct", "2026-07-28"),
    ],
)
async def test_a_stdio_server_asks_callers_of_both_eras_through_the_hive(
    hive: Hive, url: str, era: str, door: str
) -> None:
    person = Person("one", "two")
    async with hive.spawn("old") as box:
        address = url.replace("/mcp", f"/s/{box.session}/mcp") if door == "direct" else url
        tool = {"namespaced": f"{box.session}_ask", "call": "call", "direct": "ask"}[door]
        arguments: dict[str, Any] = {"session": box.session, "tool": "ask", "arguments": {}} if door == "call" else {}
        async with Client(address, mode=era, cache=None, elicitation_callback=person.elicited) as client:
            assert text(await client.call_tool(tool, arguments)) == "one, then two"
    assert person.asked == ["first?", "after one?"]


@pytest.mark.parametrize(("recipe", "says"), [("missing", "nothing"), ("silent", "it broke"), ("absent", "no-such")])
async def test_a_broken_recipe_fails_its_spawn_with_its_own_words_and_leaves_nothing(
    hive: Hive, recipe: str, says: str
) -> None:
    with pytest.raises(StartFailed, match=says) as caught:
        await hive.spawn(recipe)
    assert caught.value.data["step"] == "start" and not caught.value.trainable
    assert await hive.list() == []
