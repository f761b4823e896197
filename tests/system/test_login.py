"""A host that knows nothing but the hive's URL logs in at the provider, by what the hive's refusal tells it."""

from __future__ import annotations

import socket
from pathlib import Path

import anyio
import httpx2
import pytest
from mcp.client import Client
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
from pydantic import AnyUrl

from ash_hub.app import open_hive
from ash_hub.settings import HubSettings
from tests.router.admission.issuer import running_issuer

pytestmark = pytest.mark.anyio

BACK = "http://127.0.0.1:1/back"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Memory:
    """What a host remembers of its login."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None
        self.client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.client = client_info


class Browser:
    """Goes where the provider sends it, as the user's browser would."""

    def __init__(self) -> None:
        self.landed = httpx2.URL("")

    async def go(self, url: str) -> None:
        async with httpx2.AsyncClient() as client:
            self.landed = httpx2.URL((await client.get(url)).headers["location"])

    async def back(self) -> AuthorizationCodeResult:
        return AuthorizationCodeResult(code=self.landed.params["code"], state=self.landed.params["state"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def test_a_host_logs_in_and_is_the_providers_subject(folder: Path) -> None:
    port = free_port()
    with running_issuer() as issuer:
        settings = HubSettings(
            host="0.0.0.0",
            port=port,
            state_dir=folder / "state",
            run_dir=folder / "run",
            auth={"oidc": {"issuer": issuer.url, "audience": [f"http://127.0.0.1:{port}/mcp"]}},  # type: ignore[arg-type]
        )
        url, browser = f"http://127.0.0.1:{port}/mcp", Browser()
        metadata = OAuthClientMetadata(redirect_uris=[AnyUrl(BACK)], client_name="host")
        login = OAuthClientProvider(url, metadata, Memory(), browser.go, browser.back)
        async with open_hive(settings) as hive, httpx2.AsyncClient(auth=login, timeout=60) as http:
            with anyio.fail_after(60):
                async with Client(streamable_http_client(url, http_client=http)) as client:
                    made = await client.call_tool("spawn", {"recipe": "echo"})
                    assert not made.is_error, made.content
            (sandbox,) = hive.sandboxes.registry.all()
            assert sandbox.owner == f"{issuer.url}#ann"
        assert issuer.asked["/register"] == issuer.asked["/token"] == 1
