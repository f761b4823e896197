"""Each reason not to be admitted, at every door of a hive: refused alike, before anything behind the door is asked."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from ash_hub.app import Hive, open_hive
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from tests.router.admission.issuer import AUDIENCE, Issuer, running_issuer
from tests.system.owners import LEGACY, MODERN, Owner

pytestmark = pytest.mark.anyio

METADATA = "/.well-known/oauth-protected-resource/mcp"
META = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "nobody", "version": "1"},
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Scene:
    hive: Hive
    issuer: Issuer
    key: str
    bound: str
    revoked: str
    client: httpx.AsyncClient

    @property
    def base(self) -> str:
        return self.hive.url.replace("0.0.0.0", "127.0.0.1").removesuffix("/mcp")


@pytest.fixture(scope="module")
async def scene(anyio_backend: str) -> AsyncGenerator[Scene]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name, running_issuer() as issuer:
        folder = Path(name)
        keys = key_file(folder / "state")
        _, key = keys.add(subject="ann")
        _, bound = keys.add(subject="ann", scopes=["hers"])
        gone, revoked = keys.add(subject="ann")
        keys.revoke([gone.id])
        auth: Any = {"oidc": {"issuer": issuer.url, "audience": [AUDIENCE], "required_scopes": ["hive"]}}
        settings = HubSettings(
            host="0.0.0.0",
            port=0,
            state_dir=folder / "state",
            run_dir=folder / "run",
            allowed_hosts=("hive.test",),
            auth=auth,
        )
        async with open_hive(settings) as hive, httpx.AsyncClient() as client:
            scene = Scene(hive, issuer, key, bound, revoked, client)
            owner = Owner(hive, key, client)
            made = await owner.call("spawn", {"recipe": "echo", "session": "prey"})
            assert made.result["structuredContent"]["session"] == "prey"
            yield scene


@dataclass(frozen=True)
class Door:
    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: Any = None


def modern(method: str, name: str | None = None, *, path: str = "/mcp", **params: Any) -> Door:
    headers = {"mcp-protocol-version": MODERN, "mcp-method": method}
    if name is not None:
        headers["mcp-name"] = name
        params["name"] = name
    return Door(
        "POST", path, headers, {"jsonrpc": "2.0", "id": 1, "method": method, "params": params | {"_meta": META}}
    )


HELLO = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "nobody", "version": "1"}}
OLD = {"mcp-protocol-version": LEGACY, "mcp-session-id": "0" * 32}
UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
}
DIRECT = modern("tools/call", "echo", path="/mcp", arguments={"text": "x"})
DOORS = {
    "relayed call": modern("tools/call", "prey_echo", arguments={"text": "x"}),
    "hive's tool": modern("tools/call", "list", arguments={}),
    "list": modern("tools/list"),
    "subscription": modern("subscriptions/listen", notifications={"toolsListChanged": True}),
    "handshake": Door("POST", "/mcp", body={"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": HELLO}),
    "old session": Door("POST", "/mcp", OLD, {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}),
    "old stream": Door("GET", "/mcp", {**OLD, "accept": "text/event-stream"}),
    "old session's end": Door("DELETE", "/mcp", OLD),
    "path of a sandbox": Door("POST", "/s/prey/mcp", DIRECT.headers, DIRECT.body),
    "header of a sandbox": Door("POST", "/mcp", {**DIRECT.headers, "x-session-id": "prey"}, DIRECT.body),
    "upgrade": Door("GET", "/mcp", UPGRADE),
    "upgrade to a sandbox": Door("GET", "/s/prey/mcp", UPGRADE),
    "metrics": Door("GET", "/metrics"),
    "readiness": Door("GET", "/readyz"),
    "no such path": Door("GET", "/nope"),
    "rest": Door("POST", "/spawn", body={}),
}


def bearer(token: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}"), *more]


REASONS: dict[str, tuple[int, Callable[[Scene], list[tuple[str, str]]]]] = {
    "no credential": (401, lambda scene: []),
    "nonsense": (401, lambda scene: bearer("nonsense")),
    "unknown key": (401, lambda scene: bearer(f"ash_aaaaaaaaaa_{'a' * 52}")),
    "revoked key": (401, lambda scene: bearer(scene.revoked)),
    "another scheme": (401, lambda scene: [("authorization", "Basic YTpi")]),
    "two credentials": (400, lambda scene: [*bearer(scene.key), *bearer(scene.key)]),
    "another issuer's token": (401, lambda scene: bearer(scene.issuer.token("bob", iss="https://other.test"))),
    "another audience's token": (401, lambda scene: bearer(scene.issuer.token("bob", aud="https://other.test"))),
    "expired token": (401, lambda scene: bearer(scene.issuer.token("bob", exp=1_000_000))),
    "token without a scope": (403, lambda scene: bearer(scene.issuer.token("bob"))),
    "another host": (421, lambda scene: bearer(scene.key, ("host", "evil.test"))),
    "another origin": (403, lambda scene: bearer(scene.key, ("origin", "https://evil.test"))),
    "origin null": (403, lambda scene: bearer(scene.key, ("origin", "null"))),
    "illegal scope": (400, lambda scene: bearer(scene.key, ("ash-scope", "NOT A SCOPE"))),
    "two scopes": (400, lambda scene: bearer(scene.key, ("ash-scope", "a"), ("ash-scope", "b"))),
    "scope beyond the key": (403, lambda scene: bearer(scene.bound, ("ash-scope", "other"))),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("reason", REASONS)
async def test_no_door_opens(scene: Scene, reason: str, door: str) -> None:
    status, headers = REASONS[reason]
    asked = DOORS[door]
    sent = [("accept", "application/json, text/event-stream"), *asked.headers.items(), *headers(scene)]
    if any(name == "accept" for name in asked.headers):
        sent = sent[1:]
    response = await scene.client.request(
        asked.method, scene.base + asked.path, headers=httpx.Headers(sent), json=asked.body, timeout=10
    )
    said = (response.status_code, response.text)
    assert response.status_code == status, said
    assert response.json()["error"]["kind"], said
    challenge = response.headers.get("www-authenticate")
    if status == 401:
        assert challenge is not None and f'resource_metadata="{scene.base}{METADATA}"' in challenge
    assert "ash-origin" not in response.headers or response.headers["ash-origin"] == "hub"
    assert scene.key not in response.text


async def test_the_same_doors_open_for_whoever_may_come_in(scene: Scene) -> None:
    """What the doors above refuse is no slip in what they are asked."""
    for name in ("relayed call", "hive's tool", "list", "handshake", "path of a sandbox", "header of a sandbox"):
        asked = DOORS[name]
        sent = {
            "accept": "application/json, text/event-stream",
            **asked.headers,
            "authorization": f"Bearer {scene.key}",
        }
        response = await scene.client.request(asked.method, scene.base + asked.path, headers=sent, json=asked.body)
        assert response.status_code == 200, (name, response.text)
