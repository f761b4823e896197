"""A whole hive on a cluster, started as `ash up --backend kubernetes` is, from outside of it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import httpx
import pytest
from fastmcp import Client

from ash_mcp import Hive, StartFailed
from ash_mcp.errors import ConfigError
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod_parts import environment_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def home() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as path:
        yield Path(path)


async def pods_of(cluster: Cluster) -> list[str]:
    found = await cluster.api.get(f"/api/v1/namespaces/{cluster.namespace}/pods")
    return [str(pod["metadata"]["name"]) for pod in (found or {})["items"]]


async def test_a_pod_is_spawned_called_and_destroyed(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive:
        async with hive.spawn("general", env={"GREETING": "hello"}) as box:
            assert await pods_of(cluster) == [box.id]
            done = await box.exec('echo "$GREETING from $(hostname)"')
            assert done.stdout == f"hello from {box.id}\n"
            await box.files.write("/workspace/a.txt", "kept")
            assert await box.files.read("/workspace/a.txt") == "kept"
        assert await pods_of(cluster) == []


async def test_a_hive_that_stops_leaves_its_sandboxes_to_the_next_one(cluster: Cluster, home: Path) -> None:
    async with serving(home / "first") as url, Hive(url) as hive:
        box = await hive.spawn("general")
        await box.files.write("/workspace/a.txt", "kept")
        session = box.session
        assert await pods_of(cluster) == [box.id]
    assert await pods_of(cluster) == [box.id]
    # of another machine: it shares nothing but the cluster
    async with serving(home / "second") as url, Hive(url) as hive:
        again = await hive.attach(session)
        assert (again.id, await again.files.read("/workspace/a.txt")) == (box.id, "kept")
        await again.destroy()
        assert await pods_of(cluster) == []


async def test_failures_say_their_cause_and_leave_nothing(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive:
        began = time.monotonic()
        with pytest.raises(StartFailed, match="its image cannot be pulled"):
            await hive.spawn("general", image="localhost/ash/nothing:here")
        assert time.monotonic() - began < 5
        with pytest.raises(ConfigError, match="the cluster has no such runtime class"):
            await hive.spawn("general", runtime_class="nowhere")
        with anyio.fail_after(10):
            while await pods_of(cluster):
                await anyio.sleep(0.1)


async def test_a_server_in_a_pod_is_reached_at_its_port_and_in_a_preview(cluster: Cluster, home: Path) -> None:
    async with serving(home) as url, Hive(url) as hive, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        async with hive.spawn("general", ports=[8000, 9000]) as box:
            await box.files.write("/workspace/index.html", "from a pod")
            await box.background("python3 -m http.server 8000 --bind 127.0.0.1 --directory /workspace")
            with anyio.fail_after(20):
                while (answer := await http.get(box.port_url(8000))).status_code == 502:
                    await anyio.sleep(0.1)
            assert (answer.status_code, answer.text) == (200, "from a pod")
            assert (await http.get(box.port_url(9000))).json()["error"]["kind"] == "port_closed"
            assert (await http.get(box.port_url(9001))).json()["error"]["kind"] == "port_not_allowed"
            share = await box.share(ports=[8000])
            seen = urlsplit(share.previews[8000])
            headers = {"host": seen.netloc, "cookie": f"ash-preview={share.token}"}
            answer = await http.get(url.removesuffix("/mcp") + "/index.html", headers=headers)
            assert (answer.status_code, answer.text) == (200, "from a pod")


async def test_files_of_a_pod_pass_by_their_door_and_by_tickets(cluster: Cluster, home: Path, tmp_path: Path) -> None:
    data = os.urandom(3 * 1024 * 1024)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(data)
    async with serving(home) as url, Hive(url) as hive, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        async with hive.spawn("general") as box, hive.spawn("general") as other:
            await box.files.upload(tmp_path / "folder", "there")
            door = f"{url.removesuffix('/mcp')}/s/{box.session}/files/there/file"
            part = await http.get(door, headers={"range": "bytes=1000-1999"})
            assert (part.status_code, part.content) == (206, data[1000:2000])
            async with Client(url) as mcp:
                named = {"from_session": box.session, "from_path": "there/", "to_session": other.session}
                await mcp.call_tool("copy", {**named, "to_path": "c/"})
                made = await mcp.call_tool("download_url", {"session": other.session, "path": "c/file"})
            await other.files.download("c", tmp_path / "back")
            assert (tmp_path / "back" / "file").read_bytes() == data
            assert made.structured_content is not None
            ticket = made.structured_content["url"]
            first, again = await http.get(ticket), await http.get(ticket)
            assert (first.content, again.status_code) == (data, 401)
