"""A door is data: a further one passes through the same relay."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ash_mcp.types import DEFAULT_SCOPE
from ash_router.admission.base import Admitted
from ash_router.calls.direct import DirectRequest, direct_request_of
from ash_router.calls.door import MCP_DOOR, Door, HeaderPolicy
from ash_router.http.heads import RequestHead
from tests.router.relay_parts import Rig
from tests.router.sandbox_parts import open_script, response

FILES = Door(
    b"/_ash/files",
    frozenset({"GET", "PUT"}),
    HeaderPolicy(frozenset({b"range", b"content-type"}), frozenset({b"etag"})),
)


@pytest.mark.anyio
async def test_a_further_door_passes_through_the_same_relay_by_its_data_alone(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def find(admitted: Admitted, method: str, head: RequestHead) -> DirectRequest | None:
        assert admitted.scope == DEFAULT_SCOPE
        found = direct_request_of(rig.routes, admitted, "sb1", method)
        if found is not None:
            found.door, found.rest = FILES, head.target.removeprefix(b"/s/sb1/files")
        return found

    asked: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
            asked.append([line for line in head if not line.startswith(("ash-token", "x-forwarded-"))])
            await reader.readexactly(2)
            writer.write(response(b"ok", more="etag: e\r\nset-cookie: c\r\nmcp-session-id: s\r\n"))

    monkeypatch.setattr(rig.relay, "direct_request", find)
    async with open_script(tmp_path, serve) as socket, rig.connect() as wire:
        await rig.bind("sb1", socket)
        for _ in range(2):  # the second is of an equal head
            await wire.send(
                b"PUT /s/sb1/files/a%20b?c=d HTTP/1.1\r\nhost: h\r\nrange: bytes=0-1\r\ncookie: c\r\n"
                b"mcp-session-id: s\r\ncontent-length: 2\r\n\r\nhi"
            )
            status, headers, body = await wire.answer()
            assert (status, headers["etag"], body) == (200, "e", b"ok")
            assert not headers.keys() & {"set-cookie", "mcp-session-id"}
    line = "PUT /_ash/files/a%20b?c=d HTTP/1.1"
    assert asked == [[line, "host: sandbox", "content-length: 2", "range: bytes=0-1"]] * 2


def test_a_door_takes_its_methods_or_all():
    assert [MCP_DOOR.takes(method) for method in ("GET", "POST", "DELETE", "PUT", "HEAD")] == [True] * 3 + [False] * 2
    every = Door(b"/", None, MCP_DOOR.headers)
    assert [every.takes(method) for method in ("GET", "PATCH", "HEAD")] == [True] * 3
