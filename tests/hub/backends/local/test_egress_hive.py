"""A whole hive whose sandbox may go out: the web tool takes the proxy, and says which policy refused it."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import pytest
from mcp.client import Client
from mcp.types import TextContent

from ash_hub.app import open_hive
from ash_hub.settings import HubSettings
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.egress.egress_parts import web_server

pytestmark = [pytest.mark.anyio, needs_isolation]

PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nfrom outside"


@pytest.fixture
async def port() -> AsyncGenerator[int]:
    async with web_server(PAGE) as (port, _):
        yield port


def refusals(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the reasons of the egress lines of the audit log."""
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "ash.audit"]
    return [line["reason"] for line in lines if line["event"] == "egress"]


async def test_the_web_tool_goes_out_by_the_policy_and_names_it_when_refused(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))
    settings = HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", allow_named_addresses=True)
    async with open_hive(settings) as hive, Client(hive.url) as client:
        own = hive.url.split(":")[2].split("/")[0]
        network = [f"web.test=127.0.0.1:{port}", f"hive.test=127.0.0.1:{own}"]
        spawned = await client.call_tool("spawn", {"recipe": "general", "session": "box", "network": network})
        assert not spawned.is_error, spawned.content

        async def fetch(url: str) -> str:
            content = (await client.call_tool("box_fetch_fetch", {"url": url})).content[0]
            assert isinstance(content, TextContent)
            return content.text

        assert "from outside" in await fetch(f"http://web.test:{port}/page")
        with caplog.at_level(logging.INFO, "ash.audit"):
            for url, reason in (
                ("http://evil.org/", "not_listed"),
                ("https://evil.org/", "not_listed"),
                ("http://169.254.169.254/latest/meta-data/", "not_listed"),
                (f"http://hive.test:{own}/healthz", "hive"),
            ):
                assert f"(egress refused: {reason}; policy: web.test=127.0.0.1:{port}, " in await fetch(url)
            with anyio.move_on_after(30):  # the proxy's word comes by way of the keeper, maybe after the answer
                while len(refusals(caplog)) < 4:
                    await anyio.sleep(0.02)
        assert refusals(caplog) == ["not_listed"] * 3 + ["hive"]
        wrong = await client.call_tool("spawn", {"recipe": "general", "network": ["169.254.169.254:80"]})
        assert wrong.is_error and "can never be reached from a sandbox" in str(wrong.content)
    shutil.rmtree(folder)
