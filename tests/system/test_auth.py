"""Who may come in to a real hive: at its start, by address, by peer, by key, over TLS."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ash_hub.app import open_hive
from ash_hub.serving import auth
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings, SpawnLimits
from ash_mcp import Hive
from ash_mcp.cli import main
from ash_mcp.errors import ConfigError, Unauthenticated
from ash_mcp.types import PrincipalLimits
from ash_router.admission.api_keys import KeyFile

pytestmark = pytest.mark.anyio

OTHER_USER = 65534


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def settings(folder: Path, **given: Any) -> HubSettings:
    return HubSettings(port=0, state_dir=folder / "state", run_dir=folder / "run", **given)


async def test_a_hive_for_strangers_without_a_usable_key_does_not_start(folder: Path) -> None:
    keys = key_file(folder / "state")
    keys.add(ttl_seconds=1e-6)
    with pytest.raises(ConfigError, match="ash key new"):
        async with open_hive(settings(folder, host="0.0.0.0")):
            raise AssertionError("it served")


async def test_a_hive_for_strangers_takes_keys_and_nothing_else(folder: Path) -> None:
    _, key = key_file(folder / "state").add(subject="ann")
    async with open_hive(settings(folder, host="0.0.0.0")) as served:
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        async with Hive(url, token=key) as hive:
            assert await hive.list() == []
        async with httpx.AsyncClient() as client:
            base = url.removesuffix("/mcp")
            assert (await client.get(f"{base}/healthz")).text == "ok"
            for path in ("/mcp", "/readyz", "/metrics", "/"):
                refused = await client.get(base + path)
                assert refused.status_code == 401
                expected = f'Bearer resource_metadata="{base}/.well-known/oauth-protected-resource/mcp"'
                assert refused.headers["www-authenticate"] == expected
                assert refused.json()["error"]["kind"] == "unauthenticated"
            described = await client.get(f"{base}/.well-known/oauth-protected-resource/mcp")
            assert described.json()["resource"] == url and "authorization_servers" not in described.json()


async def test_the_relay_itself_challenges_a_call_that_it_would_have_taken(folder: Path) -> None:
    _, key = key_file(folder / "state").add()
    async with open_hive(settings(folder)) as served:
        async with Hive(served.url, token=key) as hive:
            box = await hive.spawn("echo")
            headers = {
                "authorization": "Bearer " + key[:-1] + ("a" if key[-1] != "a" else "b"),
                "mcp-protocol-version": "2026-07-28",
                "mcp-method": "tools/call",
                "mcp-name": f"{box.session}_echo",
            }
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": f"{box.session}_echo"}}
            async with httpx.AsyncClient() as client:
                refused = await client.post(served.url, headers=headers, json=body)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].endswith('error="invalid_token"')


async def test_a_key_is_revoked_in_a_hive_that_runs(folder: Path) -> None:
    keys = key_file(folder / "state")
    made, key = keys.add()
    async with open_hive(settings(folder)) as served, Hive(served.url, token=key) as hive:
        await hive.list()
        keys.revoke([made.id])
        with anyio.fail_after(5):
            with pytest.raises(Unauthenticated):
                while True:
                    await hive.list()
                    await anyio.sleep(0.1)


async def test_the_local_user_and_the_bearers_of_keys_share_a_hive_without_seeing_each_other(folder: Path) -> None:
    keys = key_file(folder / "state")
    (_, ann), (_, mine) = keys.add(subject="ann"), keys.add(subject="local", scopes=["ci"])
    async with open_hive(settings(folder)) as served:
        async with Hive(served.url) as local, Hive(served.url, token=ann) as other, Hive(served.url, token=mine) as ci:
            box = await local.spawn("echo")
            assert [info.session for info in await local.list()] == [box.session]
            assert await other.list() == [] and await ci.list() == []
            bound = await ci.spawn("echo")
            assert bound.info.scope == "ci"
            assert [info.session for info in await local.list()] == [box.session]
        async with Hive(served.url, scope="*") as local:
            assert len(await local.list()) == 2


def say_hello(url: str, user: int) -> socket.socket:
    """Send one request over a socket that belongs to `user`."""
    address = httpx.URL(url)
    os.seteuid(user)
    try:
        client = socket.create_connection((address.host, address.port or 80), timeout=10)
    finally:
        os.seteuid(0)
    client.sendall(f"GET / HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n".encode())
    return client


def hear(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as answer:
        return answer.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a socket of another user")
@pytest.mark.parametrize("check", [True, False])
async def test_another_user_of_this_machine_is_kept_out_unless_the_check_is_off(folder: Path, check: bool) -> None:
    async with open_hive(settings(folder, auth={"peer_check": check})) as served:
        own = await anyio.to_thread.run_sync(hear, say_hello(served.url, 0))
        answer = await anyio.to_thread.run_sync(hear, say_hello(served.url, OTHER_USER))
        async with httpx.AsyncClient() as client:
            ready = (await client.get(served.url.replace("/mcp", "/readyz"))).text
    assert own.startswith(b"HTTP/1.1 200")
    assert answer.startswith(b"HTTP/1.1 401" if check else b"HTTP/1.1 200")
    assert ready == "ready" if check else ready.startswith("ready; note: every user of this machine")


async def test_a_host_that_does_not_tell_who_connects_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def untold(peers: object) -> str:
        return "no sock_diag"

    monkeypatch.setattr(auth.Peers, "problem", untold)
    with caplog.at_level(logging.WARNING, "ash.hub"):
        async with open_hive(settings(folder)) as served, httpx.AsyncClient() as client:
            ready = await client.get(served.url.replace("/mcp", "/readyz"))
            assert (await client.get(served.url.replace("/mcp", "/metrics"))).status_code == 200
    assert "cannot find out who connects (no sock_diag)" in ready.text
    assert "cannot find out who connects" in caplog.text
    assert auth.peer_problem() == "no sock_diag"


def certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 with its key into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hive.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    file = folder / "hive.pem"
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return file


async def test_a_hive_can_speak_https_itself(folder: Path) -> None:
    file = certificate(folder)
    async with open_hive(settings(folder, tls_cert=file)) as served:
        assert served.url.startswith("https://127.0.0.1:")
        transport = httpx.AsyncHTTPTransport(verify=ssl.create_default_context(cafile=str(file)))
        async with Hive(served.url, transport=transport) as hive, hive.spawn("echo") as box:
            assert (await box.call("echo", text="over TLS")).structured == {"text": "over TLS"}


@pytest.mark.parametrize("given", ["nope.pem", "empty.pem"])
async def test_a_certificate_that_cannot_be_used_stops_the_start(folder: Path, given: str) -> None:
    (folder / "empty.pem").touch()
    with pytest.raises(ConfigError, match="ASH_HUB_TLS_CERT"):
        async with open_hive(settings(folder, tls_cert=folder / given)):
            raise AssertionError("it served")


@pytest.mark.parametrize(
    "oidc",
    [{"issuer": "https://x"}, {"audience": ["a"]}, {"issuer": "http://far.test", "audience": ["a"]},
     {"issuer": "nonsense", "audience": ["a"]}, {"issuer": "https://x", "audience": []}],
)  # fmt: skip
def test_half_a_provider_is_refused(folder: Path, oidc: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="oidc"):
        settings(folder, auth={"oidc": oidc})


class Ash:
    """The command line, in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(words)
        out, err = self._capfd.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err


@pytest.fixture
def ash(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ash:
    monkeypatch.setenv("ASH_HUB_STATE_DIR", str(folder / "state"))
    return Ash(capfd)


def test_the_command_line_shows_a_key_once_and_revokes_it(ash: Ash, folder: Path) -> None:
    code, out, err = ash("key", "new", "--name", "ci", "--scope", "a", "--scope", "b", "--expires", "30d")
    text = out.strip()
    assert code == 0 and text.startswith("ash_") and "not shown again" in err
    (known,) = KeyFile(folder / "state" / "keys.json").read()
    assert known.scopes == ("a", "b") and known.expires_at == pytest.approx(known.created_at + 30 * 86400)
    code, out, _ = ash("key", "list")
    assert code == 0 and "ci" in out and "a, b" in out and text not in out and known.sha256 not in out
    code, out, _ = ash("key", "list", "--json")
    (shape,) = json.loads(out)["keys"]
    assert shape["id"] == known.id and text.split("_")[2] not in out and known.sha256 not in out
    code, out, _ = ash("key", "revoke", "ci")
    assert code == 0 and known.id in out
    assert ash("key", "list")[2].startswith("No keys.")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("key", "new", "--expires", "soon"), 2, "not a duration"),
        (("key", "new", "--scope", "*"), 1, "cannot be a scope"),
        (("key", "new", "--subject", "a\nb"), 1, "printable"),
        (("key", "new", "--max-calls", "-1"), 2, "max-calls"),
        (("key", "new", "--cpu", "lots"), 1, "cpu"),
        (("key", "new", "--network", "not a domain"), 1, "network"),
        (("key", "revoke"), 2, "KEY"),
        (("key", "revoke", "nope"), 1, "ash key list"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    ash: Ash, folder: Path, words: tuple[str, ...], code: int, says: str
) -> None:
    left, out, err = ash(*words)
    assert (left, out) == (code, "") and says in err
    assert KeyFile(folder / "state" / "keys.json").read() == []


def test_a_key_with_limits_of_its_own_shows_them(ash: Ash, folder: Path) -> None:
    limits = ("--max-sandboxes", "2", "--max-calls", "5", "--memory", "4Gi", "--network", "none")
    selectors = ("--image", "team/*", "--node-selector", "pool=a", "--node-selector", "pool=b-*")
    assert ash("key", "new", *limits, *selectors)[0] == 0
    (known,) = KeyFile(folder / "state" / "keys.json").read()
    assert known.limits == PrincipalLimits(sandboxes=2, calls=5)
    allowed = SpawnLimits.model_validate_json(known.spawn_policy)
    assert allowed == SpawnLimits(
        memory="4Gi", network="none", images=("team/*",), node_selectors={"pool": ("a", "b-*")}
    )
    said = " ".join(ash("key", "list")[1].split())
    assert "sandboxes 2" in said and "4Gi" in said
    (shape,) = json.loads(ash("key", "list", "--json")[1])["keys"]
    assert shape["limits"] == {"sandboxes": 2, "calls": 5} and shape["spawn"]["network"] == "none"


def test_a_new_key_can_be_had_as_json(ash: Ash) -> None:
    code, out, err = ash("key", "new", "--subject", "ann", "--json")
    made = json.loads(out)
    assert (code, err) == (0, "") and made["subject"] == "ann" and made["key"].startswith(f"ash_{made['id']}_")
