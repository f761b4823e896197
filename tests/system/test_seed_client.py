"""The seed's client against a real hive: what the seed's README shows, with only the import line changed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import pytest

from ash_hub.serving.auth import key_file
from ash_mcp.compat import (
    ResourceReq,
    ResourceSpec,
    SandboxClient,
    SandboxConfig,
    SandboxDestroyError,
    SandboxSpawnError,
)
from tests.hive_process import hive_in

pytestmark = pytest.mark.anyio

SECONDS: Final = 60

HEAD: Final = """
import asyncio
from client import SandboxClient, SandboxConfig, ResourceReq, ResourceSpec

config = SandboxConfig(control_plane_url="{url}", gateway_url="{url}")
"""

QUICK_START: Final = """
async def main():
    with SandboxClient(config) as client:
        sandbox = client.spawn()
        print("spawned", sandbox.uuid, sandbox.status)
        mcp = client.connect()
        async with mcp:
            print(await mcp.ping())
            print(*(tool.name for tool in await mcp.list_tools()))
            result = await mcp.call_tool(
                "terminal-controller_execute_command", {"command": "echo 'Hello from sandbox!'"}
            )
            print(result.content[0].text)

asyncio.run(main())
"""

TOOLS: Final = """
async def main():
    with SandboxClient(config) as client:
        client.spawn()
        mcp = client.connect()
        async with mcp:
            for name, arguments in (
                ("terminal-controller_execute_command", {"command": "python3 --version"}),
                ("fetch_fetch", {"url": "http://127.0.0.1:9/"}),
                ("ddgs_search_mcp_search", {"query": "python asyncio tutorial", "max_results": 5}),
            ):
                result = await mcp.call_tool(name, arguments, raise_on_error=False)
                print(name, result.is_error, result.content[0].text)

asyncio.run(main())
"""

SEVERAL: Final = """
clients = [SandboxClient(config) for _ in range(3)]
sandboxes = [c.spawn() for c in clients]
print(len({s.uuid for s in sandboxes}), {s.status for s in sandboxes})

async def hear(client, word):
    async with client.connect() as mcp:
        result = await mcp.call_tool(
            "terminal-controller_execute_command", {"command": f"echo {word} > mine; cat mine"}
        )
        return result.content[0].text

async def main():
    return await asyncio.gather(*(hear(c, f"word{number}") for number, c in enumerate(clients)))

for number, text in enumerate(asyncio.run(main())):
    print(f"word{number}" in text)
print(clients[0].destroy_all()["count"])
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(hive_url: str) -> str:
    return hive_url.removesuffix("/mcp")


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name:
        yield Path(name)


@contextmanager
def losing_first_spawn(url: str, *, after_seconds: float | None) -> Generator[str]:
    """Stand before a hive and lose its answer to the first spawn, or cut that off after some time."""
    lost = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            first = self.path == "/spawn" and not lost.is_set()
            try:
                timeout = after_seconds if first and after_seconds is not None else SECONDS
                answer = httpx.request(self.command, url + self.path, content=body, headers=headers, timeout=timeout)
            except httpx.TimeoutException:
                answer = None
            if first or answer is None:
                lost.set()
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            for name in ("ash-origin", "retry-after"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_DELETE = serve

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
            assert lost.is_set()
        finally:
            server.shutdown()
            thread.join(5)


def run_script(url: str, text: str) -> str:
    script = (HEAD.replace("{url}", url) + text).replace("from client import", "from ash_mcp.compat import")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={name: value for name, value in os.environ.items() if not name.startswith("ASH_")},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


async def ping(client: SandboxClient) -> bool:
    async with client.connect() as mcp:
        return await mcp.ping()


def test_the_quick_start(url: str) -> None:
    said = run_script(url, QUICK_START).splitlines()
    _, uuid, status = said[0].split()
    assert (status, said[1]) == ("Ready", "True")
    assert {"terminal-controller_execute_command", "fetch_fetch", "ddgs_search_mcp_search"} <= set(said[2].split())
    assert "Hello from sandbox!" in said
    with pytest.raises(SandboxDestroyError, match="UUID not found"):  # the block has destroyed it
        SandboxClient(SandboxConfig(control_plane_url=url)).destroy(uuid)


@pytest.mark.heavy
def test_the_tools_are_called_by_the_seeds_names(url: str) -> None:
    said = run_script(url, TOOLS)
    assert "terminal-controller_execute_command False" in said
    assert "Python 3" in said
    assert "fetch_fetch True" in said  # the address is one that no sandbox may reach, and the tool says so itself
    assert "ddgs_search_mcp_search " in said  # what it finds depends on the network


@pytest.mark.heavy
def test_several_sandboxes_of_one_config(url: str) -> None:
    said = run_script(url, SEVERAL).splitlines()
    assert said[0] == "3 {'Ready'}"
    assert said[1:4] == ["True", "True", "True"]
    assert int(said[4]) >= 3


@pytest.mark.heavy
def test_ten_sandboxes_at_once(url: str) -> None:
    config = SandboxConfig(control_plane_url=url, gateway_url=url)
    clients = [SandboxClient(config) for _ in range(10)]
    try:
        with ThreadPoolExecutor(10) as pool:
            sandboxes = list(pool.map(SandboxClient.spawn, clients))
        assert len({sandbox.uuid for sandbox in sandboxes}) == 10
    finally:
        for client in clients:
            client.close()


@pytest.mark.heavy
async def test_a_whole_config(url: str) -> None:
    config = SandboxConfig(
        control_plane_url=url,
        gateway_url=url,
        image="timemagic/rl-mcp:general-1.7",
        ports=[3000],
        env={"DEBUG": "true", "API_KEY": "sesame"},
        resources=ResourceReq(
            requests=ResourceSpec(cpu="100m", memory="256Mi"),
            limits=ResourceSpec(cpu="500m", memory="512Mi"),
        ),
        timeout=300,
        mcp_timeout=180,
    )
    with SandboxClient(config) as client:
        assert client.health_check() and client.ready_check()
        sandbox = client.spawn("mine")
        assert (sandbox.name, sandbox.ports) == ("mine", [3000])
        assert sandbox.uuid.startswith("mine-")
        async with client.connect() as mcp:
            result = await mcp.call_tool("terminal-controller_execute_command", {"command": "echo $DEBUG $API_KEY"})
            assert "true sesame" in str(result.content)


@pytest.mark.heavy
@pytest.mark.parametrize("after_seconds", [None, 0.1], ids=["answer lost", "cut off while it starts"])
def test_a_lost_answer_makes_one_sandbox(home: Path, after_seconds: float | None) -> None:
    with hive_in(home) as (hive_url, _):
        url = hive_url.removesuffix("/mcp")
        with losing_first_spawn(url, after_seconds=after_seconds) as lossy:
            sandbox = SandboxClient(SandboxConfig(lossy, lossy)).spawn()
        assert sandbox.is_ready
        assert SandboxClient(SandboxConfig(url, url)).destroy_all() == {
            "deleted": [sandbox.uuid],
            "failed": [],
            "count": 1,
        }


def test_what_this_backend_does_not_have_is_refused_in_words(url: str) -> None:
    for config, words in (
        (SandboxConfig(url, url, runtime_class="kata-fc"), "no runtime class 'kata-fc'"),
        (SandboxConfig(url, url, node_selector={"gpu": "true"}), "node"),
        (SandboxConfig(url, url, image="custom-sandbox:latest"), "no recipe .* 'custom-sandbox:latest'"),
    ):
        with pytest.raises(SandboxSpawnError, match=words):
            SandboxClient(config).spawn()


@pytest.mark.heavy
def test_a_key_comes_with_the_url_or_from_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, ann), (_, bob) = (key_file(home / "state").add(subject=subject) for subject in ("ann", "bob"))
    with hive_in(home) as (hive_url, _):
        near = hive_url.removesuffix("/mcp")
        keyed = near.replace("http://", f"http://{ann}@")
        monkeypatch.setenv("ASH_TOKEN", bob)
        theirs = SandboxClient(SandboxConfig(near, near))
        with SandboxClient(SandboxConfig(keyed, keyed)) as client:
            sandbox = client.spawn()
            assert anyio.run(ping, client)
            with pytest.raises(SandboxDestroyError, match="UUID not found"):
                theirs.destroy(sandbox.uuid)
            assert theirs.destroy_all()["count"] == 0
        monkeypatch.setenv("ASH_TOKEN", ann)
        with SandboxClient(SandboxConfig(near, near)) as client:
            client.spawn()
            assert SandboxClient(SandboxConfig(keyed, keyed)).destroy_all()["count"] == 1
        monkeypatch.setenv("ASH_TOKEN", "nonsense")
        with pytest.raises(SandboxSpawnError, match="ASH_TOKEN"):
            SandboxClient(SandboxConfig(near, near)).spawn()
