"""URLs of servers inside a sandbox: for programs, and for browsers."""

from __future__ import annotations

import pytest

from ash_mcp import Hive, PortNotAllowed, Unsupported
from ash_mcp.sync import Hive as SyncHive
from tests.ash_mcp.twin import TwinHive


@pytest.mark.anyio
async def test_a_browser_gets_a_url_that_is_a_share_of_this_port(twin: TwinHive, hive: Hive):
    box = await hive.spawn(ports=[8000, 9000])
    url = await box.url(8000, ttl_seconds=60)
    assert url.startswith("http://8000-x.localhost/?s=ashs_")
    (share,) = await box.shares()
    assert (share.tools, share.ports) == ((), (8000,)) and share.expires_at is not None
    with pytest.raises(PortNotAllowed):
        await box.url(80)
    twin.has_previews = False
    with pytest.raises(Unsupported, match="ASH_HUB_PREVIEW_URL"):
        await box.url(9000)
    assert await box.shares() == [share], "one of no use is taken back"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1/mcp", "http://h:1"),
        ("https://mcp.test/mcp/in/a", "https://mcp.test"),
        ("http://h/mcp/", "http://h"),
        ("http://h/mcp?expand=all", "http://h"),
        ("https://h/below/mcp/in/mcp/", "https://h/below"),
    ],
)
async def test_a_program_gets_one_beside_the_hives_endpoint(twin: TwinHive, url: str, base: str):
    async with Hive(url, transport=twin.transport) as hive:
        box = await hive.spawn(ports=[8000])
        assert box.port_url(8000) == f"{base}/s/{box.id}/ports/8000/"


def test_the_sync_sdk_has_both(twin: TwinHive):
    with SyncHive("http://h/mcp", transport=twin.transport) as hive, hive.spawn(ports=[8000]) as box:
        assert box.port_url(8000) == f"http://h/s/{box.id}/ports/8000/"
        assert box.url(8000).startswith("http://8000-x.localhost/")
