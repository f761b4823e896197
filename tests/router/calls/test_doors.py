"""Doors to one sandbox: what passes each of them, both ways, and what never does."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ash_mcp.errors import AshError
from ash_mcp.types import DEFAULT_SCOPE, Endpoint, Principal, SandboxId
from ash_router.caller.relay import RelayLimits
from ash_router.calls.door import DOORS, FILES_DOOR, MCP_DOOR, OF_ORIGIN, Door
from ash_router.ledger import Call
from tests.router.relay_parts import Rig, Wire, open_rig, route_to
from tests.router.sandbox_parts import open_script, response

pytestmark = pytest.mark.anyio

HOSTILE = (
    "etag: e\r\nset-cookie: c\r\nmcp-session-id: s\r\nservice-worker-allowed: /\r\ncontent-security-policy: x\r\n"
    "content-disposition: inline\r\naccess-control-allow-origin: *\r\nx-content-type-options: no\r\n"
    "cross-origin-resource-policy: cross-origin\r\n"
)
SAFE = {
    "content-security-policy": "sandbox",
    "content-disposition": "attachment",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class FileRunner:
    """Says what it was asked for, with whatever else a hostile sandbox may say."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.answer = response(b"ok", more=HOSTILE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
                self.asked.append([line for line in head if not line.startswith(("ash-token", "x-forwarded-"))])
                length = next((int(line[16:]) for line in head if line.startswith("content-length: ")), 0)
                await reader.readexactly(length)
                writer.write(self.answer)


@pytest.fixture
async def runner(rig: Rig, tmp_path: Path) -> AsyncGenerator[FileRunner]:
    runner = FileRunner()
    async with open_script(tmp_path, runner.serve) as socket:
        await rig.bind("sb1", socket)
        yield runner


async def ask(wire: Wire, line: str, *more: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    lines = [f"{line} HTTP/1.1", "host: h", *more, f"content-length: {len(body)}"]
    await wire.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)
    if line.startswith("HEAD"):
        return *await wire.head(), b""
    return await wire.answer()


async def test_the_file_door_passes_its_headers_and_no_others(rig: Rig, runner: FileRunner):
    async with rig.connect() as wire:
        for _ in range(2):  # the second is of an equal head
            more = ("range: bytes=0-1", "cookie: c", "mcp-session-id: s", "authorization: Bearer x", "ash-token: t")
            status, headers, body = await ask(wire, "PUT /s/sb1/files/a%20b?c=d&scope=x&expand=y", *more, body=b"hi")
            assert (status, body, headers["etag"], headers["ash-origin"]) == (200, b"ok", "e", "sandbox")
            assert SAFE.items() <= headers.items()
            assert not headers.keys() & {"set-cookie", "mcp-session-id", "service-worker-allowed"}
            assert not any(name.startswith("access-control-") for name in headers)
    line = "PUT /_ash/files/a%20b?c=d&scope=x&expand=y HTTP/1.1"
    assert runner.asked == [[line, "host: sandbox", "range: bytes=0-1", "content-length: 2"]] * 2


async def test_a_get_is_a_call_and_no_stream(rig: Rig, runner: FileRunner, monkeypatch: pytest.MonkeyPatch):
    counted: list[int] = []
    begin = rig.ledger.begin

    def count(
        sandbox_id: SandboxId | None, owner: str, fail: Callable[[AshError], None], guests: str | None = None
    ) -> Call:
        counted.append(len(rig.relay.services.streams))
        return begin(sandbox_id, owner, fail, guests)

    monkeypatch.setattr(rig.ledger, "begin", count)
    async with rig.connect() as wire:
        assert (await ask(wire, "GET /s/sb1/files/a"))[0] == 200
    assert counted == [0]


@pytest.mark.parametrize(
    "status", ["304 Not Modified", "206 Partial Content", "404 Not Found", "416 Range Not Satisfiable"]
)
async def test_what_a_file_server_says_passes(rig: Rig, runner: FileRunner, status: str):
    runner.answer = f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode()
    async with rig.connect() as wire:
        if status.startswith("304"):
            runner.answer = b"HTTP/1.1 304 Not Modified\r\netag: e\r\n\r\n"
            await wire.send(b"GET /s/sb1/files/a HTTP/1.1\r\nhost: h\r\n\r\n")
            assert (await wire.head())[0] == 304
        else:
            assert (await ask(wire, "GET /s/sb1/files/a"))[0] == int(status[:3])


@pytest.mark.parametrize("status", ["302 Found", "401 Unauthorized"])
async def test_a_redirect_and_a_challenge_never_pass(rig: Rig, runner: FileRunner, status: str):
    runner.answer = f"HTTP/1.1 {status}\r\nlocation: /mcp\r\ncontent-length: 0\r\n\r\n".encode()
    async with rig.connect() as wire:
        answer = await ask(wire, "GET /s/sb1/files/a")
        assert (answer[0], "location" in answer[1]) == (502, False)


async def test_a_head_is_answered_by_the_length_alone_and_the_connection_goes_on(rig: Rig, runner: FileRunner):
    runner.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5368709120\r\n\r\n"
    async with rig.connect() as wire:
        status, headers, _ = await ask(wire, "HEAD /s/sb1/files/a")
        assert (status, headers["content-length"]) == (200, "5368709120") and SAFE.items() <= headers.items()
        assert (await ask(wire, "HEAD /s/sb1/files/a"))[0] == 200


async def test_a_head_that_fails_has_no_body_either(rig: Rig, tmp_path: Path):
    route = route_to(tmp_path / "nobody")
    await rig.routes.bind(route)
    async with rig.connect() as wire:
        status, _, _ = await ask(wire, "HEAD /s/sb1/files/a")
        assert status == 502
        assert (await ask(wire, "GET /elsewhere"))[2].startswith(b'{"subject"')


async def test_a_body_has_no_cap(tmp_path: Path):
    runner = FileRunner()
    limits = RelayLimits(max_direct_body_bytes=2000, linger_seconds=0.1)
    async with open_rig(tmp_path, limits=limits) as rig, open_script(tmp_path, runner.serve) as socket:
        await rig.bind("sb1", socket)
        async with rig.connect() as wire:
            assert (await ask(wire, "PUT /s/sb1/files/a", body=bytes(300_000)))[0] == 200
            assert (await ask(wire, "POST /s/sb1/mcp", body=bytes(300_000)))[0] == 413


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_an_answer_that_breaks_off_is_cut_off_and_nothing_is_added(rig: Rig, tmp_path: Path, kind: str):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode() + b"5\r\ndata:\r\n")
        await writer.drain()
        writer.close()

    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        await wire.send(b"GET /s/sb1/files/a HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await wire.head())[0] == 200
        assert await wire.reader.read() == b"5\r\ndata:\r\n"


def refused(said: bytes) -> str:
    return json.loads(said)["error"]["kind"]


@pytest.mark.parametrize(
    "more",
    [
        *(
            f"sec-fetch-dest: {dest}"
            for dest in ("document", "iframe", "serviceworker", "Document", "worker", "object")
        ),
        "sec-fetch-dest: empty\r\nsec-fetch-dest: document",
        "sec-fetch-site: cross-site",
        "sec-fetch-site: same-site",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_browser_gets_nothing_to_show_or_embed(rig: Rig, runner: FileRunner, method: str, more: str):
    async with rig.connect() as wire:
        status, _, said = await ask(wire, f"{method} /s/sb1/files/a", more)
    assert (status, refused(said), runner.asked) == (403, "permission_denied", [])


@pytest.mark.parametrize("more", ["sec-fetch-dest: empty\r\nsec-fetch-site: same-origin", "sec-fetch-site: none"])
async def test_a_program_in_a_browser_gets_what_it_fetches(rig: Rig, runner: FileRunner, more: str):
    async with rig.connect() as wire:
        assert (await ask(wire, "GET /s/sb1/files/a", more))[0] == 200


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /s/sb1/files/../mcp", 400),
        ("GET /s/sb1/files/%2e%2e/_ash/claim", 400),
        ("GET /s/sb1/files/..%2f_ash/claim", 400),
        ("GET /s/sb1/files//etc", 400),
        ("GET /s/sb1/files/a%00", 400),
        ("GET /s/sb1/files/a\\b", 400),
        ("GET /s/%73b1/files/a", 400),
        ("GET http://h/s/sb1/files/a", 400),
        ("GET /s/theirs/files/a", 404),
        ("GET /s/nobody/files/a", 404),
        ("POST /s/sb1/files/a", 405),
        ("PATCH /s/sb1/files/a", 405),
        ("GET /s/sb1/terminal", 426),
        ("PUT /s/sb1/terminal", 405),
        ("GET /s/sb1/%74erminal", 400),
        ("GET /s/sb1/terminal/../mcp", 400),
        ("GET /s/theirs/terminal", 404),
    ],
)
async def test_no_trick_and_nobody_elses_name_reaches_a_sandbox(rig: Rig, runner: FileRunner, line: str, status: int):
    route = rig.routes.resolve(Principal("me"), DEFAULT_SCOPE, "sb1")
    assert route is not None
    await rig.bind("theirs", Path(route.endpoint.unix or ""), owner="somebody")
    async with rig.connect() as wire:
        got, headers, _ = await ask(wire, line)
    assert (got, headers["ash-origin"], runner.asked) == (status, "hub", [])


@pytest.mark.parametrize("line", ["GET /s/sb1/ports/80/"])
async def test_a_door_that_is_not_in_the_table_is_the_apps_and_no_sandboxs(rig: Rig, runner: FileRunner, line: str):
    async with rig.connect() as wire:
        _, headers, _ = await ask(wire, line)
    assert (headers["ash-origin"], runner.asked) == ("hub", [])


async def test_a_server_without_a_runner_has_no_files(rig: Rig, tmp_path: Path):
    route = route_to(tmp_path / "x")
    endpoint = Endpoint(unix=route.endpoint.unix, server_path="/mcp")
    await rig.routes.bind(replace(route, endpoint=endpoint))
    async with rig.connect() as wire:
        status, _, said = await ask(wire, "GET /s/sb1/files/a")
    assert (status, refused(said)) == (501, "unsupported")


def test_a_door_takes_its_methods_or_all():
    assert [MCP_DOOR.takes(method) for method in ("GET", "POST", "DELETE", "PUT", "HEAD")] == [True] * 3 + [False] * 2
    every = Door(b"/", None, MCP_DOOR.headers)
    assert [every.takes(method) for method in ("GET", "PATCH", "HEAD")] == [True] * 3


def test_no_door_passes_on_what_acts_on_the_hives_origin():
    for door in DOORS.values():
        passed = OF_ORIGIN - door.headers.response if door.headers.is_denylist else OF_ORIGIN & door.headers.response
        assert not passed
    assert FILES_DOOR.lines
