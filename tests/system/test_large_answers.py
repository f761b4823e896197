"""Answers of any size pass through a data plane of bounded memory, whoever is the slow one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.bench.relaying import served
from ash_hub.bench.wire import modern_call

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

MIB = 2**20
BLOCK = b"%x\r\n%b\r\n" % (MIB, b"x" * MIB)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


def peak_mib(pid: int) -> float:
    """The most memory that a process has ever had."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.parametrize("size", [256, 1024])
@pytest.mark.parametrize("door", ["by name", "directly"])
async def test_an_answer_larger_than_the_hive_passes_through_it(tmp_path: Path, size: int, door: str) -> None:
    async def sandbox(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD % (b"text/event-stream" if door == "by name" else b"application/octet-stream"))
        for _ in range(size):
            writer.write(BLOCK)
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        writer.close()

    socket = str(tmp_path / "sandbox.sock")
    server = await asyncio.start_unix_server(sandbox, socket)
    async with server, served("plane", socket, "1") as plane:
        headers = plane.bearer()
        name = "sb0_flood"
        if door == "directly":
            headers["x-session-id"], name = plane.said["sandbox_id"], "flood"
        reader, writer = await asyncio.open_connection("127.0.0.1", plane.port, limit=MIB)
        writer.write(modern_call("tools/call", {"name": name, "arguments": {}}, headers))
        total, last = 0, b""
        with anyio.fail_after(100):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.3)  # a reader who takes its time, and then one who does not
            while not last.endswith(b"0\r\n\r\n"):
                data = await reader.read(MIB)
                assert data, "the answer was cut"
                total += len(data)
                last = (last + data)[-5:]
        assert total > size * MIB
        assert peak_mib(plane.pid) < 150
        writer.close()
