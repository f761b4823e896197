"""Servers inside a sandbox through the relay: for programs at the door of ports, for browsers at a preview's host."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_mcp.types import DEFAULT_SCOPE, NO_LIMITS, Endpoint, Principal
from ash_router.admission.bearer import Credentials
from ash_router.admission.preview_hosts import PreviewNames
from ash_router.admission.share_tokens import ShareTokens
from ash_router.admission.shares import Shares, new_share
from ash_router.bounds.limits import RelayLimits
from ash_router.calls.ports import PREVIEW_DOOR
from ash_router.http.framing import ResponseHead
from ash_router.upstream.call_tokens import CallTokens
from tests.router.admission.gate_parts import gate
from tests.router.relay_parts import Rig, Wire, open_rig, route_to
from tests.router.sandbox_parts import open_script, response

pytestmark = pytest.mark.anyio

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
SAFE: Final = {
    "content-security-policy": "sandbox",
    "content-disposition": "attachment",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
}
HOSTILE: Final = (
    "set-cookie: own=1; Path=/; Domain=previews.test; HttpOnly\r\nset-cookie: ash-preview=stolen\r\n"
    "set-cookie: __Host-ash-preview=stolen; Secure\r\nservice-worker-allowed: /\r\ncontent-security-policy: x\r\n"
    "content-disposition: inline\r\naccess-control-allow-origin: *\r\nclear-site-data: *\r\nalt-svc: h3\r\n"
    "strict-transport-security: max-age=1\r\nwww-authenticate: Basic\r\nash-origin: hub\r\nash-nonce: n\r\n"
    "x-own: yes\r\n"
)


class Inside:
    """A runner that hands connections over, and the server behind it, which says what it is told to say."""

    def __init__(self) -> None:
        self.opened: list[list[str]] = []
        self.asked: list[list[str]] = []
        self.bodies: list[bytes] = []
        self.answer = response(b"ok", more=HOSTILE)
        self.runner = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened.append(await self._head(reader))
        writer.write(self.runner)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await self.serve_inside(reader, writer)
        self.left.set()

    async def serve_inside(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await self._head(reader)
            self.asked.append(head)
            length = next((int(line[16:]) for line in head if line.startswith("content-length: ")), 0)
            self.bodies.append(await reader.readexactly(length))
            writer.write(self.answer)

    async def _head(self, reader: asyncio.StreamReader) -> list[str]:
        return (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")


@pytest.fixture
async def inside(rig: Rig, tmp_path: Path) -> AsyncGenerator[Inside]:
    inside = Inside()
    async with open_script(tmp_path, inside.serve) as socket:
        await rig.routes.bind(replace(route_to(socket), ports=(8000, 9000)))
        yield inside


async def ask(
    wire: Wire, line: str, *more: str, body: bytes = b"", host: str = "h"
) -> tuple[int, dict[str, str], bytes]:
    lines = [f"{line} HTTP/1.1", f"host: {host}", *more, f"content-length: {len(body)}"]
    await wire.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)
    if line.startswith("HEAD"):
        return *await wire.head(), b""
    return await wire.answer()


def kind(body: bytes) -> str:
    return json.loads(body)["error"]["kind"]


async def test_a_program_reaches_the_server_at_a_port_and_its_credential_does_not(rig: Rig, inside: Inside):
    more = ("authorization: Bearer k", "cookie: c=d", "ash-scope: x", "ash-token: t", "x-session-id: sb1",
            "x-forwarded-for: me", "x-own: a", "te: x", "connection: x-hop", "x-hop: b")  # fmt: skip
    async with rig.connect() as wire:
        for _ in range(2):  # the second is of an equal head
            status, headers, body = await ask(wire, "PATCH /s/sb1/ports/8000/a%20b?scope=x&y", *more, body=b"hi")
            assert (status, body, headers["x-own"], headers["ash-origin"]) == (200, b"ok", "yes", "sandbox")
            assert SAFE.items() <= headers.items()
            unsafe = {"set-cookie", "service-worker-allowed", "alt-svc", "clear-site-data", "www-authenticate"}
            assert not headers.keys() & unsafe and headers["ash-nonce"] != "n"
    opened = inside.opened[0]
    assert opened[:4] == [
        "GET /_ash/ports/8000 HTTP/1.1", "host: sandbox", "connection: upgrade", "upgrade: websocket"
    ] and opened[4].startswith("ash-token: ") and len(opened) == 5  # fmt: skip
    assert len(inside.opened) == 2, "no connection is kept"
    assert inside.asked == [
        ["PATCH /a%20b?scope=x&y HTTP/1.1", "host: localhost:8000", "x-own: a",
         "x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-forwarded-host: h", "content-length: 2"]
    ] * 2  # fmt: skip
    assert inside.bodies == [b"hi"] * 2


async def test_without_a_path_the_root_is_asked_for(rig: Rig, inside: Inside):
    async with rig.connect() as wire:
        for target in ("/s/sb1/ports/9000", "/s/sb1/ports/9000/", "/s/sb1/ports/9000?a", "/s/sb1/ports/9000/9000"):
            assert (await ask(wire, f"GET {target}"))[0] == 200
    assert [head[0].split()[1] for head in inside.asked] == ["/", "/", "/?a", "/9000"]


@pytest.mark.parametrize("status", ["301 Moved", "401 No", "404 Not", "500 Bad", "304 Same", "204 None", "299 Own"])
async def test_every_status_passes_and_what_is_compressed(rig: Rig, inside: Inside, status: str):
    body = b"" if status[:3] in ("304", "204") else b"\x1f\x8b"
    inside.answer = response(body, status=status, more="content-encoding: gzip\r\n", kind="text/html")
    if not body:
        inside.answer = f"HTTP/1.1 {status}\r\ncontent-encoding: gzip\r\n\r\n".encode()
    async with rig.connect() as wire:
        got, headers, said = await ask(wire, "GET /s/sb1/ports/8000/")
        assert (got, headers["content-encoding"], said) == (int(status[:3]), "gzip", body)


REDIRECTS: Final = {
    "/login?a=b#c": "login?a=b#c",
    "next": "a/next",
    "?q": "a/b?q",
    "../up": "up",
    "http://localhost:8000/x": "x",
    "http://127.0.0.1:8000": "",
    "https://elsewhere.test/": None,
    "//elsewhere.test/": None,
    "http://127.0.0.1:8420/mcp": None,
    "http://localhost:9000/": None,
    "/%2e%2e/%2E%2e/mcp": None,
    "/x\\..\\mcp": None,
    "/x//y": None,
    "javascript:1": None,
    "http://[": None,
}


@pytest.mark.parametrize("location", REDIRECTS)
async def test_a_redirect_leads_below_the_door_or_nowhere(rig: Rig, inside: Inside, location: str):
    inside.answer = response(b"", status="302 Found", more=f"location: {location}\r\n")
    (route,) = rig.routes.of(Principal("me"), DEFAULT_SCOPE)
    async with rig.connect() as wire:
        status, headers, _ = await ask(wire, "GET /s/sb1/ports/8000/a/b")
    led = REDIRECTS[location]
    assert status == 302
    below = f"/s/{route.sandbox_id}/ports/8000/"
    assert headers.get("location") == (None if led is None else f"{below}{led}".lower())


async def test_bodies_pass_as_they_come_both_ways(rig: Rig, tmp_path: Path):
    came, go_on = asyncio.Event(), asyncio.Event()

    class Streaming(Inside):
        async def serve_inside(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(8) == b"3\r\none\r\n"
            came.set()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n")
            await go_on.wait()
            assert await reader.readexactly(5) == b"0\r\n\r\n"
            writer.write(b"data: 2\n\n")
            writer.close()

    async with open_script(tmp_path, Streaming().serve) as socket:
        await rig.routes.bind(replace(route_to(socket), ports=(8000,)))
        async with rig.connect() as wire:
            await wire.send(
                b"POST /s/sb1/ports/8000/ HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n"
            )
            with anyio.fail_after(5):
                await came.wait()
            status, headers = await wire.head()
            assert (status, headers["transfer-encoding"]) == (200, "chunked")
            assert await wire.chunk() == b"data: 1\n\n"
            go_on.set()
            await wire.send(b"0\r\n\r\n")
            assert await wire.chunk() == b"data: 2\n\n"


async def test_an_answer_that_breaks_off_is_cut_off(rig: Rig, inside: Inside):
    inside.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"
    async with rig.connect() as wire:
        await wire.send(b"GET /s/sb1/ports/8000/ HTTP/1.1\r\nhost: h\r\n\r\n")
        status, headers = await wire.head()
        assert (status, headers["content-length"]) == (200, "10")
        assert await wire.reader.readexactly(4) == b"half"
        for connection in list(rig.relay.services.upstreams._open):  # pyright: ignore[reportPrivateUsage]
            connection._transport.abort()  # type: ignore[union-attr]  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
        assert await wire.ended()


async def test_a_caller_who_leaves_is_gone_for_the_server_too(rig: Rig, inside: Inside):
    inside.answer = b""
    async with rig.connect() as wire:
        await wire.send(b"GET /s/sb1/ports/8000/ HTTP/1.1\r\nhost: h\r\n\r\n")
        with anyio.fail_after(5):
            while not inside.asked:
                await asyncio.sleep(0)
    with anyio.fail_after(5):
        await inside.left.wait()


RUNNERS: Final = {
    "port_closed": (502, {"error": {"kind": "port_closed", "message": "x"}}, 502, "port_closed"),
    "an old image": (404, {"error": {"kind": "not_found"}}, 501, "unsupported"),
    "a token that it does not take": (401, {"error": {"kind": "unauthenticated"}}, 502, "connect_failed"),
    "starting": (503, {"error": {"kind": "starting"}}, 502, "connect_failed"),
    "nonsense": (500, [1], 502, "connect_failed"),
}


@pytest.mark.parametrize("case", RUNNERS)
async def test_what_the_runner_refuses_is_a_typed_failure(rig: Rig, inside: Inside, case: str):
    status, said, expected, named = RUNNERS[case]
    inside.runner = response(json.dumps(said).encode(), status=f"{status} X")
    async with rig.connect() as wire:
        got, headers, body = await ask(wire, "GET /s/sb1/ports/8000/")
    assert (got, kind(body), headers["ash-origin"]) == (expected, named, "hub")
    assert case != "port_closed" or "nobody listens on port 8000" in json.loads(body)["error"]["message"]


async def test_only_ports_that_the_spawn_allowed(rig: Rig, inside: Inside):
    for port in ("80", "8001", "65536", "99999"):
        async with rig.connect() as wire:
            status, _, body = await ask(wire, f"GET /s/sb1/ports/{port}/")
        assert (status, kind(body)) == (403, "port_not_allowed")
    assert inside.opened == []


async def test_an_image_without_a_runner_has_no_ports(rig: Rig, tmp_path: Path):
    route = replace(route_to(tmp_path / "no"), endpoint=Endpoint(host="127.0.0.1", port=9, server_path="/mcp"))
    await rig.routes.bind(replace(route, ports=(8000,)))
    async with rig.connect() as wire:
        status, _, body = await ask(wire, "GET /s/sb1/ports/8000/")
    assert (status, kind(body)) == (501, "unsupported")


@pytest.mark.parametrize("dest", ["document", "iframe", "serviceworker", "worker", "object"])
async def test_a_browser_gets_nothing_on_the_hives_own_origin(rig: Rig, inside: Inside, dest: str):
    async with rig.connect() as wire:
        status, _, body = await ask(wire, "GET /s/sb1/ports/8000/", f"sec-fetch-dest: {dest}")
    assert (status, kind(body), inside.opened) == (403, "permission_denied", [])


async def test_a_websocket_passes(rig: Rig, inside: Inside):
    inside.answer = (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nset-cookie: c\r\n\r\n\x81\x02hi"
    )
    async with rig.connect() as wire:
        await wire.send(
            f"GET /s/sb1/ports/8000/ws?a HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
            f"sec-websocket-version: 13\r\nsec-websocket-key: {KEY}\r\nauthorization: Bearer k\r\n\r\n".encode()
        )
        status, headers = await wire.head()
        assert (status, "set-cookie" in headers) == (101, False)
        assert await wire.reader.readexactly(4) == b"\x81\x02hi"
    (head,) = inside.asked
    assert head[:2] == ["GET /ws?a HTTP/1.1", "host: localhost:8000"]
    assert f"sec-websocket-key: {KEY}" in head and not any(line.startswith("authorization") for line in head)


# At a preview's host.


class Preview:
    """A rig behind the gate of a hive, with a share of one sandbox's port 8000."""

    def __init__(self, rig: Rig, inside: Inside, label: str, token: str) -> None:
        self.rig, self.inside = rig, inside
        self.host = f"8000-{label}.localhost:8420"
        self.cookie = f"cookie: ash-preview={token}; own=1"


@asynccontextmanager
async def open_preview(tmp_path: Path) -> AsyncGenerator[Preview]:
    credentials = Credentials(is_issued=lambda text: "of.the.provider" in text)
    inside, made = Inside(), gate(tmp_path / "keys.json", credentials=credentials, previews=PreviewNames())
    share, token = new_share([], 0.0, None, (8000,))
    async with open_rig(tmp_path, gate=made) as rig, open_script(tmp_path, inside.serve) as socket:
        made.take_shares(ShareTokens(rig.routes.shared, None, lambda: 0.0, NO_LIMITS))
        await rig.routes.bind(replace(route_to(socket), ports=(8000,), shares=Shares(1, (share,))))
        yield Preview(rig, inside, share.label, token)


async def test_a_preview_passes_what_is_its_own_and_every_path(tmp_path: Path):
    async with open_preview(tmp_path) as preview, preview.rig.connect() as wire:
        for target in ("/", "/mcp", "/s/sb1/mcp", "/%2e%2e/_ash//x?ash_scope=y", "/healthz"):
            status, headers, body = await ask(
                wire, f"POST {target}", preview.cookie, "authorization: Bearer k", f"origin: http://{preview.host}",
                body=b"hi", host=preview.host,
            )  # fmt: skip
            assert (status, body, headers["set-cookie"]) == (200, b"ok", "own=1; path=/; httponly")
            assert (headers["content-security-policy"], headers["x-own"]) == ("x", "yes")
            assert not headers.keys() & {"clear-site-data", "alt-svc", "strict-transport-security"}
            assert headers["www-authenticate"] == "basic"
            head = preview.inside.asked.pop()
            assert head[:2] == [f"POST {target} HTTP/1.1", f"host: {preview.host}"]
            assert "cookie: own=1" in head and f"origin: http://{preview.host}" in head
            assert "authorization: Bearer k" in head and not any("ash-preview" in line for line in head)


async def test_a_token_of_the_hive_never_gets_to_a_previews_server(tmp_path: Path):
    key = f"ash_{'a' * 10}_{'b' * 52}"
    async with open_preview(tmp_path) as preview, preview.rig.connect() as wire:
        for user in (f"{key}:", f"me:{key}", f"ashs_{key[4:]}:x", "of.the.provider"):
            basic = base64.b64encode(user.encode()).decode()
            for sent in (f"Basic {basic}", f"Bearer {user}", f"Token {user}", f'Digest username="{user}"'):
                await ask(wire, "GET /", preview.cookie, f"authorization: {sent}", host=preview.host)
                assert not any(line.startswith("authorization") for line in preview.inside.asked.pop()), sent
        for sent in ("Negotiate YII=", "NTLM TlRMTVNTUA=="):
            await ask(wire, "GET /", preview.cookie, f"authorization: {sent}", host=preview.host)
            assert not any(line.startswith("authorization") for line in preview.inside.asked.pop()), sent
        twice = (f"authorization: {sent}" for sent in ("Bearer own", f"Bearer {key}"))
        await ask(wire, "GET /", preview.cookie, *twice, host=preview.host)
        assert not preview.inside.asked or not any("authorization" in line for line in preview.inside.asked.pop())
    async with open_preview(tmp_path) as preview, preview.rig.connect() as wire:
        for sent in ("Bearer eyJ.a.b", "Basic bWU6aXQ=", "Basic %", "Token flash_aaaaaaaaaa_b"):
            await ask(wire, "GET /", preview.cookie, f"authorization: {sent}", host=preview.host)
            assert f"authorization: {sent}" in preview.inside.asked.pop()


async def test_a_preview_ends_with_its_share(tmp_path: Path):
    async with open_preview(tmp_path) as preview:
        async with preview.rig.connect() as first:
            assert (await ask(first, "GET /", preview.cookie, host=preview.host))[0] == 200
        (route,) = preview.rig.routes.of(Principal("me"), DEFAULT_SCOPE)
        await preview.rig.routes.bind(replace(route, shares=Shares(2)))
        async with preview.rig.connect() as second:
            assert (await ask(second, "GET /", preview.cookie, host=preview.host))[0] == 401


def test_what_passes_a_preview_door_is_what_its_own_origin_may_have():
    cookies = [
        (b"set-cookie", b"a=1;domain=.test ; Path=/"), (b"set-cookie", b" ash-preview =x"),
        (b"set-cookie", b"b=2; SameSite=None; Secure"), (b"location", b"http://127.0.0.1:8420/mcp"),
        (b"www-authenticate", b'Basic realm="negotiated"'), (b"www-authenticate", b"Negotiate"),
        (b"www-authenticate", b'Basic realm="x", nTLM'), (b"www-authenticate", b"Bearer"),
    ]  # fmt: skip
    lines = PREVIEW_DOOR.headers.response_lines(ResponseHead(302, cookies))
    assert lines.split(b"\r\n")[1:] == [
        b"location: http://127.0.0.1:8420/mcp",
        b'www-authenticate: Basic realm="negotiated"',
        b"www-authenticate: Bearer",
        b"set-cookie: a=1; Path=/",
        b"set-cookie: b=2; SameSite=None; Secure",
        b"",
    ]


async def test_a_sandbox_on_tcp_proves_itself_before_it_is_asked_for_a_port(tmp_path: Path):
    tokens = CallTokens(Ed25519PrivateKey.generate())
    asked: list[bytes] = []

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(response(b'{"proof": "00"}'))
        asked.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    async with server, open_rig(tmp_path, tokens=tokens) as rig:
        endpoint = Endpoint(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
        await rig.routes.bind(replace(route_to(tmp_path / "no"), endpoint=endpoint, ports=(8000,)))
        async with rig.connect() as wire:
            status, _, body = await ask(wire, "GET /s/sb1/ports/8000/", "authorization: Bearer k")
    assert (status, kind(body)) == (502, "connect_failed")
    assert asked[0].startswith(b"GET /_ash/proof ") and asked[1] == b""


async def test_guests_of_one_sandbox_have_together_what_one_owner_may_have(tmp_path: Path):
    made, inside = gate(tmp_path / "keys.json"), Inside()
    inside.answer = b""
    shares = [new_share([], 0.0, None, (8000,)) for _ in range(3)]
    limits = RelayLimits(max_in_flight_per_owner=2, max_streams_per_owner=1)
    async with open_rig(tmp_path, gate=made, limits=limits) as rig, open_script(tmp_path, inside.serve) as socket:
        made.take_shares(ShareTokens(rig.routes.shared, None, lambda: 0.0, NO_LIMITS))
        held = Shares(1, tuple(share for share, _ in shares))
        await rig.routes.bind(replace(route_to(socket), ports=(8000,), shares=held))
        door = "GET /s/sb1/ports/8000/"
        keys = [f"authorization: Bearer {token}" for _, token in shares]
        async with rig.connect() as first, rig.connect() as second, rig.connect() as third, rig.connect() as fourth:
            for wire, key in ((first, keys[0]), (second, keys[1])):
                await wire.send(f"{door} HTTP/1.1\r\nhost: 127.0.0.1\r\n{key}\r\n\r\n".encode())
            with anyio.fail_after(5):
                while len(inside.asked) < 2:
                    await asyncio.sleep(0)
            status, headers, body = await ask(third, door, keys[2], host="127.0.0.1")
            assert (status, kind(body), headers["retry-after"]) == (429, "capacity_exceeded", "1")
            assert "guests of this sandbox have 2 calls" in json.loads(body)["error"]["message"]
            upgrade = ("connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13",
                       f"sec-websocket-key: {KEY}")  # fmt: skip
            lines = "\r\n".join([f"{door} HTTP/1.1", "host: 127.0.0.1", keys[0], *upgrade, "", ""])
            await fourth.send(lines.encode())
            with anyio.fail_after(5):
                while len(inside.asked) < 3:
                    await asyncio.sleep(0)
            async with rig.connect() as fifth:
                await fifth.send(lines.replace(keys[0], keys[1]).encode())
                status, _, body = await fifth.answer()
                assert (status, "1 streams" in json.loads(body)["error"]["message"]) == (429, True)
        with anyio.fail_after(5):  # all of them have left
            guests = f"guests of {next(iter(rig.routes.ids()))}"
            while rig.ledger.in_flight.get(guests) or rig.relay.services.streams:
                await asyncio.sleep(0)
        inside.answer = response(b"ok")
        async with rig.connect() as wire:
            assert (await ask(wire, door, keys[2], host="127.0.0.1"))[0] == 200
