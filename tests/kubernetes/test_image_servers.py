"""Images that are MCP servers by themselves, as real pods: the test's image with a plain FastMCP program."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

from ash_mcp import Hive, StartFailed
from ash_mcp.errors import Unsupported
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod_parts import IMAGE, PYTHON, environment_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]

COMMAND = [
    PYTHON,
    "-c",
    """
import os
from fastmcp import FastMCP
server = FastMCP("own")

@server.tool
def variable(name: str) -> str | None:
    return os.environ.get(name)

@server.tool
def write(path: str) -> int:
    with open(path, "w") as file:
        return file.write("kept")

print("the server's own line", flush=True)
server.run("http", host="0.0.0.0", port=3000, path="/mcp", show_banner=False)
""",
]
RECIPE = f"""
name = "own"
description = "A server by itself."
image = {json.dumps(IMAGE)}
env = {{ A = "recipe $(HOME) $$ $x", B = "recipe" }}
[server.image]
port = 3000
command = {json.dumps(COMMAND)}
"""


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = home / "recipes" / "own"
    recipe.mkdir(parents=True)
    (recipe / "recipe.toml").write_text(RECIPE)
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASH_HUB_RECIPE_DIRS", json.dumps([str(recipe.parent)]))


@pytest.fixture
def home() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as path:
        yield Path(path)


async def secrets_of(cluster: Cluster) -> list[dict[str, Any]]:
    found = await cluster.api.get(f"/api/v1/namespaces/{cluster.namespace}/secrets", labelSelector="ash/sandbox")
    return (found or {})["items"]


async def until_none_is_left(cluster: Cluster) -> None:
    with anyio.fail_after(60):  # the cluster's own collector deletes what a pod owned
        while await secrets_of(cluster):
            await anyio.sleep(0.2)


async def test_one_is_spawned_called_and_destroyed(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive:
        async with hive.spawn("own", env={"B": "spawn"}, secrets={"C": "s3cret"}) as box:
            assert [tool.name for tool in await box.tools()] == ["variable", "write"]
            said = [(await box.call("variable", arguments={"name": name})).text for name in ("A", "B", "C")]
            assert said == ["recipe $(HOME) $$ $x", "spawn", "s3cret"]
            assert (await box.call("write", path="/tmp/a")).structured == {"result": 4}
            assert (await box.call("write", path="/home/ash/a")).structured == {"result": 4}
            assert (await box.call("write", path="/opt/a")).is_error, "its root is read-only like any other"
            assert "the server's own line" in await box.logs()
            with pytest.raises(Unsupported, match="needs a runner"):
                await box.exec("true")
            [secret] = await secrets_of(cluster)
            assert [owner["name"] for owner in secret["metadata"]["ownerReferences"]] == [box.id]
        await until_none_is_left(cluster)


async def test_over_rest_an_image_that_stands_for_no_recipe_serves_by_itself(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the image's own entrypoint is the runner; here it is as if it were the server
    template = {"spec": {"containers": [{"name": "sandbox", "command": COMMAND}]}}
    monkeypatch.setenv("ASH_HUB_BACKEND__POD_TEMPLATE", json.dumps(template))
    async with serving(home) as url, httpx.AsyncClient(base_url=url.removesuffix("/mcp"), timeout=100) as client:
        answer = await client.post("/spawn", json={"image": IMAGE, "env": {"A": "spawn"}})
        assert answer.status_code == 200, answer.text
        uuid = answer.json()["uuid"]
        assert answer.json()["status"] == "Ready"
        async with Client(StreamableHttpTransport(url, headers={"X-Session-ID": uuid})) as mcp:
            assert (await mcp.call_tool("variable", {"name": "A"})).data == "spawn"
        assert (await client.delete(f"/deprovision/{uuid}")).status_code == 200
    await until_none_is_left(cluster)


async def test_the_next_hive_calls_one_that_was_left_to_it(cluster: Cluster, home: Path) -> None:
    async with serving(home / "first") as url, Hive(url) as hive:
        box = await hive.spawn("own", secrets={"C": "s3cret"})
        session = box.session
    async with serving(home / "second") as url, Hive(url) as hive:
        again = await hive.attach(session)
        assert (await again.call("variable", arguments={"name": "C"})).text == "s3cret"
        await again.destroy()
    await until_none_is_left(cluster)


async def test_an_image_without_the_runner_is_told_what_to_do(
    cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASH_HUB_BACKEND__PYTHON", "/nowhere/python")
    async with serving(home) as url, Hive(url) as hive:
        with pytest.raises(StartFailed, match="The image does not hold the runner: build it on recipes/Dockerfile"):
            await hive.spawn("general")
