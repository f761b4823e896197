"""Images that are MCP servers by themselves, through a whole hive: from the recipe to the answer of a call.

The API server is the stand-in; the pods are real MCP servers on loopback.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.exceptions import ToolError

from ash_hub.app import open_hive
from ash_hub.backends.kubernetes.api import Json
from ash_hub.settings import HubSettings
from ash_mcp import Hive, StartFailed
from ash_mcp.errors import ConnectFailed, Unsupported
from tests.hub.backends.kubernetes.pod_server import PodServer, following
from tests.image_server import Image, running_image

pytestmark = pytest.mark.anyio

RECIPE = """
name = "{name}"
description = "A server by itself."
image = "registry.test/own:1"
[server.image]
port = {port}
path = "{path}"
"""


def secrets_of(cluster: PodServer) -> list[tuple[str, Json]]:
    """Return the Secrets of sandboxes."""
    found = cluster.others.objects.items()
    return [(at, kept) for at, kept in found if "ash/sandbox" in kept["metadata"]["labels"]]


class Cluster(PodServer):
    """Runs each pod at once, at an address where the image's server listens already."""

    async def create(self, path: str, body: Any) -> Any:
        made = await super().create(path, body)
        if body["kind"] == "Pod":
            state: list[Json] = [{"name": "sandbox", "state": {"running": {}}}]
            self.change(made["metadata"]["name"], {"podIP": "127.0.0.1", "containerStatuses": state})
        return made


@pytest.fixture
async def image() -> AsyncGenerator[Image]:
    async with running_image() as image:
        yield image


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
async def url(folder: Path, image: Image, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[str]:
    recipes = folder / "recipes"
    for name, path in (("own", "/serve"), ("astray", "/elsewhere")):
        (recipes / name).mkdir(parents=True)
        (recipes / name / "recipe.toml").write_text(RECIPE.format(name=name, port=image.port, path=path))
    settings = HubSettings(port=0, state_dir=folder / "s", run_dir=folder / "r", recipe_dirs=(recipes,))
    async with following(cluster, monkeypatch) as backend, open_hive(settings, backend) as hive:
        yield hive.url


async def test_its_tools_are_listed_and_called_in_both_eras(url: str, image: Image) -> None:
    async with Hive(url) as hive, hive.spawn("own", session="box") as box:
        assert [tool.name for tool in await box.tools()] == ["add", "meet", "wait"], (
            "names of the runner's are nobody else's"
        )
        assert (await box.call("add", a=1, b=2)).structured == {"result": 3}
        assert (await box.call("add", a=2, b=2)).structured == {"result": 4}
        assert len(set(image.sessions)) == 1, "a caller's calls, one after another, are of one session"
        async with Client(url) as client:
            assert (await client.call_tool("box_add", {"a": 3, "b": 4})).data == 7
        legacy = Client(StreamableHttpTransport(url), mode="legacy")
        async with legacy:
            assert (await legacy.call_tool("box_add", {"a": 4, "b": 4})).data == 8
        async with Client(url.removesuffix("/mcp") + "/s/box/mcp") as client:
            assert (await client.call_tool("add", {"a": 5, "b": 4})).data == 9
            assert "ash_exec" in [tool.name for tool in await client.list_tools()], "directly it is its own server"


async def test_it_is_sent_nothing_that_opens_a_sandbox_and_no_connection_to_it_is_kept(url: str, image: Image) -> None:
    async with Hive(url) as hive, hive.spawn("own") as box:
        for _ in range(3):
            await box.call("add", a=1, b=2)
    assert {head[":path"] for head in image.heads} == {"/serve"}
    assert not [name for head in image.heads for name in head if name.startswith("ash-") or name == "authorization"]
    clients = [head[":client"] for head in image.heads]
    assert len(set(clients)) == len(clients) > 6


async def test_its_env_and_secrets_are_in_a_secret_that_goes_with_the_pod(url: str, cluster: Cluster) -> None:
    async with Hive(url) as hive:
        async with hive.spawn("own", env={"A": "1"}, secrets={"TOKEN": "s3cret"}) as box:
            [(at, kept)] = secrets_of(cluster)
            assert at.endswith(f"/{box.id}")
            assert {name: base64.b64decode(value) for name, value in kept["data"].items()} == {
                "A": b"1",
                "TOKEN": b"s3cret",
            }
            pod = cluster.pods[box.id]
            [owner] = kept["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["uid"]) == ("Pod", pod["metadata"]["uid"])
            assert pod["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": box.id}}]
            assert "s3cret" not in json.dumps(pod)
        assert secrets_of(cluster) == []
        async with hive.spawn("own") as box:
            assert secrets_of(cluster) == [] and "envFrom" not in cluster.pods[box.id]["spec"]["containers"][0]


async def test_what_needs_a_runner_is_unsupported_and_never_asked_of_it(url: str, image: Image) -> None:
    async with Hive(url) as hive, hive.spawn("own", session="box") as box:
        asked = len(image.heads)
        with pytest.raises(Unsupported, match="ash_exec needs a runner, and sandbox box is an image that serves MCP"):
            await box.exec("true")
        with pytest.raises(Unsupported, match="needs a runner"):
            await box.files.write("a.txt", "x")
        async with Client(url) as client:
            with pytest.raises(ToolError, match="without a runner that could read its files: call a tool of its own"):
                await client.call_tool("read_resource", {"session": "box", "uri": "sandbox://box/a.txt"})
            assert len(image.heads) == asked
            read = await client.call_tool("read_resource", {"session": "box", "uri": "notes://one"})
            assert "a note" in str(read.content)


async def test_it_is_not_dialled_while_the_hive_hears_nothing_of_the_cluster(url: str, cluster: Cluster) -> None:
    async with Hive(url) as hive, hive.spawn("own") as box:
        await box.call("add", a=1, b=2)
        cluster.go_away()
        with anyio.fail_after(10):
            while True:
                try:
                    await box.call("add", a=1, b=2)
                except ConnectFailed as error:
                    assert "cannot see now whether its address is still its own" in error.message
                    assert error.retryable and not error.trainable
                    break
        cluster.is_away = False
        with anyio.fail_after(10):
            while True:
                try:
                    assert (await box.call("add", a=1, b=2)).structured == {"result": 3}
                    break
                except ConnectFailed:
                    await anyio.sleep(0.05)


async def test_a_session_that_it_has_lost_is_opened_anew(url: str, image: Image) -> None:
    async with Hive(url) as hive, hive.spawn("own") as box:
        await box.call("add", a=1, b=2)
        image.lost |= set(image.sessions)
        assert (await box.call("add", a=1, b=3)).structured == {"result": 4}
        assert len(set(image.sessions)) == 2


async def test_calls_at_once_have_sessions_of_their_own_and_one_whose_caller_leaves_is_ended(
    url: str, image: Image
) -> None:
    async with Hive(url) as hive, hive.spawn("own") as box:
        async with anyio.create_task_group() as group:
            group.start_soon(box.call, "wait")
            with anyio.fail_after(10):
                await image.waiting.wait()
            assert (await box.call("add", a=1, b=2)).structured == {"result": 3}
            group.cancel_scope.cancel()
        with anyio.fail_after(10):
            await image.cancelled.wait()


async def test_a_server_that_is_late_is_waited_for(url: str, image: Image) -> None:
    image.not_yet = 2
    async with Hive(url) as hive, hive.spawn("own") as box:
        assert (await box.call("add", a=1, b=2)).structured == {"result": 3}


async def test_who_is_no_mcp_server_fails_the_start_with_its_place(url: str, cluster: Cluster, image: Image) -> None:
    async with Hive(url) as hive:
        with pytest.raises(StartFailed, match=f"no MCP server answers at /elsewhere of port {image.port}: .*404"):
            await hive.spawn("astray", secrets={"A": "b"})
    assert (cluster.pods, secrets_of(cluster)) == ({}, [])


async def test_over_rest_an_image_that_stands_for_no_recipe_is_a_server_by_itself(
    url: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, image: Image
) -> None:
    root = url.removesuffix("/mcp")
    spawn = {"image": "me/own:2", "ports": [{"container_port": image.port}], "env": {"A": "1"}}
    async with httpx.AsyncClient(base_url=root) as client:
        answer = await client.post("/spawn", json=spawn)
        assert answer.status_code == 502 and "no MCP server answers at /mcp" in answer.json()["error"]
        image.path = "/mcp"
        answer = await client.post("/spawn", json=spawn)
        assert answer.status_code == 200, answer.text
        uuid = answer.json()["uuid"]
        [pod] = cluster.pods.values()
        assert pod["spec"]["containers"][0]["image"] == "me/own:2" and len(secrets_of(cluster)) == 1
        transport = StreamableHttpTransport(url, headers={"X-Session-ID": uuid})
        async with Client(transport) as mcp:
            assert (await mcp.call_tool("add", {"a": 5, "b": 4})).data == 9
        assert (await client.delete(f"/deprovision/{uuid}")).status_code == 200
    assert (cluster.pods, secrets_of(cluster)) == ({}, [])
