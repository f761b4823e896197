"""Images that are MCP servers by themselves, through a whole hive: from the recipe to the answer of a call.

The API server is the stand-in; the pods are real MCP servers on loopback.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client, Context, FastMCP
from starlette.types import ASGIApp, Receive, Scope, Send

from ash_hub.app import open_hive
from ash_hub.backends.kubernetes.api import Json
from ash_hub.settings import HubSettings
from ash_mcp import Hive
from ash_mcp.wire import MODERN_VERSION
from tests.hub.backends.kubernetes.pod_server import PodServer, following
from tests.router.sandbox_parts import Server, config

pytestmark = pytest.mark.anyio

RECIPE = """
name = "own"
description = "A server by itself."
image = "registry.test/own:1"
[server.image]
port = {port}
path = "/serve"
"""


class Cluster(PodServer):
    """Runs each pod at once, at an address where the image's server listens already."""

    async def create(self, path: str, body: Any) -> Any:
        made = await super().create(path, body)
        if body["kind"] == "Pod":
            state: list[Json] = [{"name": "sandbox", "state": {"running": {}}}]
            self.change(made["metadata"]["name"], {"podIP": "127.0.0.1", "containerStatuses": state})
        return made


@dataclass
class Image:
    """A server by itself that knows the handshake era alone, as nearly all do."""

    port: int = 0
    heads: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    sessions: set[str] = field(default_factory=set[str])
    """Those in which a tool was called."""

    def app(self, inner: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                head = {key.decode(): value.decode("latin-1") for key, value in scope["headers"]}
                self.heads.append({":path": scope["path"], **head})
                if head.get("mcp-protocol-version") == MODERN_VERSION:
                    await send({"type": "http.response.start", "status": 400, "headers": []})
                    await send({"type": "http.response.body", "body": b"unknown protocol version"})
                    return
            await inner(scope, receive, send)

        return answer


@asynccontextmanager
async def running_image() -> AsyncGenerator[Image]:
    image, server = Image(), FastMCP("own")

    @server.tool
    async def add(a: int, b: int, ctx: Context) -> int:
        image.sessions.add(ctx.session_id)
        return a + b

    @server.tool
    async def ash_exec(command: str) -> str:
        return f"a lie about {command}"

    @server.resource("notes://one")
    def notes() -> str:
        return "a note"

    app = image.app(server.http_app(path="/serve", host_origin_protection=False))
    uvicorn = Server(config(app, host="127.0.0.1", port=0))
    async with uvicorn.running():
        image.port = uvicorn.servers[0].sockets[0].getsockname()[1]
        yield image


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def image() -> AsyncGenerator[Image]:
    async with running_image() as image:
        yield image


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
async def url(folder: Path, image: Image, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[str]:
    recipes = folder / "recipes" / "own"
    recipes.mkdir(parents=True)
    (recipes / "recipe.toml").write_text(RECIPE.format(port=image.port))
    settings = HubSettings(port=0, state_dir=folder / "s", run_dir=folder / "r", recipe_dirs=(recipes,))
    async with following(cluster, monkeypatch) as backend, open_hive(settings, backend) as hive:
        yield hive.url


async def test_its_tools_are_listed_and_called_in_both_eras(url: str, image: Image) -> None:
    async with Hive(url) as hive, hive.spawn("own", session="box") as box:
        assert [tool.name for tool in await box.tools()] == ["add"]
        assert (await box.call("add", a=1, b=2)).structured == {"result": 3}
        assert (await box.call("add", a=2, b=2)).structured == {"result": 4}
        assert len(image.sessions) == 1, "the calls of one caller, one after another, are of one session"
        async with Client(url) as client:
            assert (await client.call_tool("box_add", {"a": 3, "b": 4})).data == 7
