"""Doors to ports of a real hive's sandboxes: what passes, and hosts of previews; `door_table.py` has who comes in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httpx
import pytest

from ash_mcp import Hive, Sandbox, Share
from tests.system.owners import Two, open_two

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

PORT: Final = 8000
SERVE: Final = """
import http.server, json
class Seen(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps({"path": self.path, "headers": sorted(self.headers.items())}).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    do_POST = do_PUT = do_DELETE = do_GET
http.server.ThreadingHTTPServer(("127.0.0.1", %d), Seen).serve_forever()
"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def two() -> AsyncGenerator[Two]:
    async with open_two() as two:
        yield two


@dataclass
class Doors:
    """A hive of two owners, and a sandbox of the first one's that serves at a port."""

    two: Two
    box: Sandbox
    http: httpx.AsyncClient

    @property
    def base(self) -> str:
        return self.two.hive.url.removesuffix("/mcp")

    async def ask(self, target: str, headers: Mapping[str, str], method: str = "GET") -> httpx.Response:
        """Send a target as it is written: httpx would make it canonical."""
        parts = urlsplit(self.base)
        url = httpx.URL(
            scheme=parts.scheme, host=parts.hostname or "", port=parts.port, raw_path=target.encode("latin-1")
        )
        return await self.http.request(method, url, headers=dict(headers))

    @property
    def door(self) -> str:
        return f"/s/{self.box.id}/ports/{PORT}/"

    @property
    def owner(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.two.ann.token}"}


@pytest.fixture(scope="module")
async def doors(two: Two) -> AsyncGenerator[Doors]:
    async with Hive(two.hive.url, two.ann.token) as hive, httpx.AsyncClient(trust_env=False, timeout=30) as http:
        async with hive.spawn("general", ports=[PORT, 9000]) as box:
            await box.background(["python3", "-c", SERVE % PORT])
            made = Doors(two, box, http)
            with anyio.fail_after(20):
                while (await made.ask(made.door, made.owner)).status_code != 200:
                    await anyio.sleep(0.05)
            yield made


async def share(doors: Doors, **asked: Any) -> Share:
    return await doors.box.share(**asked)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def test_its_owner_and_a_share_of_the_port_come_in_and_their_credentials_do_not(doors: Doors):
    guest = await share(doors, ports=[PORT])
    for headers, door in (
        (doors.owner, doors.door),
        (doors.owner, f"/s/{doors.box.session}/ports/{PORT}/"),
        (bearer(guest.token), doors.door),
    ):
        for method in ("GET", "POST", "PUT", "DELETE"):
            more = {"cookie": "a=b", "ash-scope": "", "x-own": "c"}
            answer = await doors.ask(f"{door}a%20b?c=d", {**headers, **more}, method)
            assert (answer.status_code, answer.headers["content-security-policy"]) == (200, "sandbox")
            seen = answer.json()
            assert seen["path"] == "/a%20b?c=d" and ["x-own", "c"] in seen["headers"]
            assert doors.two.ann.token not in answer.text and guest.token not in answer.text
            names = {name.lower() for name, _ in seen["headers"]}
            assert not names & {"authorization", "cookie"} and not any(name.startswith("ash-") for name in names)


async def test_a_port_where_nobody_listens_and_one_that_was_not_allowed(doors: Doors):
    closed = await doors.ask(f"/s/{doors.box.id}/ports/9000/", doors.owner)
    assert (closed.status_code, closed.json()["error"]["kind"]) == (502, "port_closed")
    other = await doors.ask(f"/s/{doors.box.id}/ports/9001/", doors.owner)
    assert (other.status_code, other.json()["error"]["kind"]) == (403, "port_not_allowed")


HOSTS: Final[Mapping[str, Callable[[str], str]]] = {
    "another port": lambda host: host.replace("8000-", "9000-", 1),
    "another label": lambda host: host[:5] + "a" * 20 + host[25:],
    "a session for a label": lambda host: "8000-anns" + host[25:],
    "no port": lambda host: host[5:],
}


async def test_a_previews_host_is_opened_by_its_own_secret_alone_and_reaches_no_route_of_the_hive(doors: Doors):
    first, second = await share(doors, ports=[PORT]), await share(doors, ports=[PORT, 9000])
    host = urlsplit(first.previews[PORT]).netloc
    good = {"host": host, "cookie": f"ash-preview={first.token}"}
    for path in ("/", "/mcp", "/s/x/mcp", "/metrics", "/readyz", "/spawn", "/s/BOX/files/x", "/%2e%2e/_ash/claim"):
        answer = await doors.ask(path, good)
        assert (answer.status_code, answer.json()["path"], answer.headers["ash-origin"]) == (200, path, "sandbox")
        assert first.token not in answer.text
    for bad in (
        {},
        {"cookie": f"ash-preview={second.token}"},
        bearer(first.token),
        doors.owner,
        {"x-session-id": doors.box.id},
    ):
        answer = await doors.ask("/", {"host": host, **bad})
        assert (answer.status_code, answer.json()["error"]["kind"]) == (401, "unauthenticated")
    for name, change in HOSTS.items():
        answer = await doors.ask("/mcp", {**good, "host": change(host)})
        assert answer.status_code in (401, 421), name
    await doors.box.revoke_shares(first.id)
    with anyio.fail_after(5):
        while (await doors.ask("/", good)).status_code != 401:
            await anyio.sleep(0.05)
    await doors.box.revoke_shares()
