"""Two owners of one real hive, one with an API key and one with a token of an OpenID provider, as raw as HTTP is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from ash_hub.app import Hive, open_hive
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from tests.router.admission.issuer import AUDIENCE, running_issuer

MODERN: Final = "2026-07-28"
LEGACY: Final = "2025-11-25"
_ACCEPT: Final = "application/json, text/event-stream"
_META: Final[Mapping[str, Any]] = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientCapabilities": {},
    "io.modelcontextprotocol/clientInfo": {"name": "owner", "version": "1"},
}
_NEVER_SAME: Final = ("ash-nonce", "mcp-session-id")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, as far as a caller can see it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: str

    def without(self, *names: str) -> Answer:
        """Return it with each of `names` written as NAME."""
        body = self.body
        for name in names:
            body = body.replace(name, "NAME")
        return Answer(self.status, self.headers, body)

    @property
    def result(self) -> Any:
        text = self.body
        if "data: " in text:
            text = text.split("data: ")[-1].split("\n")[0]
        return json.loads(text)["result"]


@dataclass
class Owner:
    """One caller of a hive."""

    hive: Hive
    token: str
    client: httpx.AsyncClient
    session: str = ""
    """The transport session of the handshake era."""

    async def http(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: Any = None
    ) -> Answer:
        url = self.hive.url.removesuffix("/mcp") + path
        sent = {"authorization": f"Bearer {self.token}", "accept": _ACCEPT, **(headers or {})}
        response = await self.client.request(method, url, headers=sent, json=body, timeout=30)
        seen = tuple(sorted((k, v) for k, v in response.headers.items() if k not in _NEVER_SAME))
        return Answer(response.status_code, seen, response.text)

    async def ask(self, era: str, method: str, params: Mapping[str, Any], path: str = "/mcp") -> Answer:
        """Send one request of an era; its id is always the same, so that answers can be compared."""
        message: dict[str, Any] = {"jsonrpc": "2.0", "id": 7, "method": method, "params": dict(params)}
        headers = {"mcp-protocol-version": era}
        if era == MODERN:
            headers["mcp-method"] = method
            named = params.get("name") or params.get("uri")
            if named is not None:
                headers["mcp-name"] = str(named)
            message["params"]["_meta"] = dict(_META)
        else:
            headers["mcp-session-id"] = self.session
        return await self.http("POST", path, headers=headers, body=message)

    async def call(self, tool: str, arguments: Mapping[str, Any], era: str = MODERN, path: str = "/mcp") -> Answer:
        return await self.ask(era, "tools/call", {"name": tool, "arguments": dict(arguments)}, path)

    @asynccontextmanager
    async def listening(self, era: str) -> AsyncGenerator[httpx.Response]:
        """Open the stream on which an era hears of changed lists."""
        sent = {"authorization": f"Bearer {self.token}", "accept": _ACCEPT, "mcp-protocol-version": era}
        if era == LEGACY:
            sent |= {"mcp-session-id": self.session, "accept": "text/event-stream"}
            async with self.client.stream("GET", self.hive.url, headers=sent) as response:
                yield response
            return
        params = {"notifications": {"toolsListChanged": True}, "_meta": dict(_META)}
        message = {"jsonrpc": "2.0", "id": 8, "method": "subscriptions/listen", "params": params}
        sent |= {"mcp-method": "subscriptions/listen"}
        async with self.client.stream("POST", self.hive.url, headers=sent, json=message) as response:
            yield response

    async def open_session(self) -> None:
        """Begin a session of the handshake era."""
        hello = {"protocolVersion": LEGACY, "capabilities": {}, "clientInfo": {"name": "owner", "version": "1"}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
        sent = {"authorization": f"Bearer {self.token}", "accept": _ACCEPT}
        response = await self.client.post(self.hive.url, headers=sent, json=message)
        self.session = response.headers["mcp-session-id"]
        ready = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        headers = {"mcp-session-id": self.session, "mcp-protocol-version": LEGACY}
        await self.http("POST", "/mcp", headers=headers, body=ready)


@dataclass(frozen=True, slots=True)
class Two:
    """The owners: ann has an API key, bob a token of a provider."""

    hive: Hive
    ann: Owner
    bob: Owner


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=30)  # a stream may be silent while other tests keep the machine busy


@asynccontextmanager
async def open_two(**more: Any) -> AsyncGenerator[Two]:
    """Serve a hive for both; each has sandboxes `prey` (alive) and `dead` (ended), and a session of its own."""
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name, running_issuer() as issuer:
        folder = Path(name)
        _, key = key_file(folder / "state").add(name="ann", subject="ann")
        settings = HubSettings(
            port=0,
            state_dir=folder / "state",
            run_dir=folder / "run",
            auth={"oidc": {"issuer": issuer.url, "audience": [AUDIENCE]}},  # type: ignore[arg-type]
            **more,
        )
        async with open_hive(settings) as hive, _client() as first, _client() as second:
            ann, bob = Owner(hive, key, first), Owner(hive, issuer.token("bob"), second)
            for owner, session in ((ann, "anns"), (bob, "bobs")):
                await owner.open_session()
                for prey in (f"{session}prey", f"{session}dead"):
                    made = await owner.call("spawn", {"recipe": "echo", "session": prey, "idempotency_key": prey})
                    assert made.result["structuredContent"]["session"] == prey
                await owner.call("destroy", {"session": f"{session}dead"})
            yield Two(hive, ann, bob)
