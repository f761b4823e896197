"""Lines on real descriptors, and the bridge as a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from ash_mcp.bridge.stdio import LineReader, LineWriter, StdinTooLong
from tests.ash_mcp.bridge.bridge_parts import ENVELOPE, INITIALIZE, SmallServer

BRIDGE = """
import os, sys, anyio
from ash_mcp.bridge.stdio_bridge import run_bridge

async def find():
    print("stray")
    os.system("echo stray; cat")
    return sys.argv[1]

async def main():
    await run_bridge(find=find)

anyio.run(main)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[SmallServer]:
    with SmallServer().serving() as server:
        yield server


async def _lines(data: bytes, **bounds: int) -> list[bytes]:
    there, here = os.pipe()
    os.write(here, data)
    os.close(here)
    try:
        return [line async for line in LineReader(there, **bounds)]
    finally:
        os.close(there)


@pytest.mark.anyio
async def test_lines_are_cut_at_line_breaks_only() -> None:
    assert await _lines(b'{"a":1}\r\n\n  \n{"b":"\xe2\x80\xa8"}\nlast') == [
        b'{"a":1}\r',
        b'{"b":"\xe2\x80\xa8"}',
        b"last",
    ]


@pytest.mark.anyio
async def test_an_endless_line_is_refused() -> None:
    with pytest.raises(StdinTooLong):
        await _lines(b"x" * 1000, max_line_bytes=100)


@pytest.mark.anyio
async def test_a_file_can_be_stdin(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"one\ntwo\n")
    descriptor = os.open(path, os.O_RDONLY)
    assert [line async for line in LineReader(descriptor)] == [b"one", b"two"]
    os.close(descriptor)


@pytest.mark.anyio
async def test_a_cancelled_sender_leaves_no_half_line_and_a_slow_reader_loses_nothing() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    long = b"x" * 3_000_000
    writer = LineWriter(ours.fileno())
    received = bytearray()

    def read_all() -> None:
        while piece := theirs.recv(1 << 20):
            received.extend(piece)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as reading:
            async with anyio.create_task_group() as writing:
                writing.start_soon(writer.run)
                await writer.send(long)
                with anyio.move_on_after(0.05) as waiting:
                    await writer.send(b"given up")
                assert waiting.cancelled_caught
                reading.start_soon(anyio.to_thread.run_sync, read_all)
                await writer.send(b"second")
                writer.close()
            ours.shutdown(socket.SHUT_WR)
    assert bytes(received) == long + b"\nsecond\n"
    ours.close()
    theirs.close()


@contextmanager
def _bridge(url: str) -> Generator[subprocess.Popen[bytes]]:
    command, pipe = [sys.executable, "-c", BRIDGE, url], subprocess.PIPE
    process: subprocess.Popen[bytes] = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    with process:
        try:
            yield process
        finally:
            process.kill()


def _call(tool: str) -> bytes:
    params = {"name": tool, "arguments": {}, "_meta": ENVELOPE}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode() + b"\n"


def test_stdout_carries_only_messages(server: SmallServer) -> None:
    with _bridge(server.url) as process:
        said, aside = process.communicate(_call("echo") + b"junk\n", timeout=20)
    assert process.returncode == 0
    assert {json.loads(line)["id"] for line in said.splitlines()} == {1, None}
    assert aside.split() == [b"stray", b"stray"]


def test_sigterm_ends_it_at_once_also_during_a_call(server: SmallServer) -> None:
    with _bridge(server.url) as process:
        assert process.stdin is not None
        process.stdin.write(_call("hang"))
        process.stdin.flush()
        assert server.hanging.wait(20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert server.let_go.wait(5)


def test_it_ends_when_nobody_reads_its_stdout(server: SmallServer) -> None:
    with _bridge(server.url) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        process.stdin.write(_call("echo"))
        process.stdin.flush()
        assert process.wait(20) == 0


def test_the_first_answer_waits_for_no_import_that_it_does_not_need() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "ash_mcp.cli", "up", "--stdio"]
    hello = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": INITIALIZE}).encode()
    pipe, env = subprocess.PIPE, {**os.environ, "ASH_URL": "http://127.0.0.1:1/mcp"}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env) as process:
        said, aside = process.communicate(hello + b"\n", timeout=20)
    assert json.loads(said)["result"]["serverInfo"]["name"] == "ash"
    imported = {line.rpartition(b"|")[2].strip().decode() for line in aside.splitlines()}
    assert "ash_mcp.bridge.stdio_bridge" in imported
    assert imported.isdisjoint({"typer", "pydantic", "mcp", "ash_hub", "uvicorn", "tenacity"})


def test_without_a_hive_it_says_so_to_the_host_and_on_stderr() -> None:
    with _bridge("http://127.0.0.1:1/mcp") as process:
        said, aside = process.communicate(_call("echo"), timeout=20)
    assert json.loads(said)["error"]["data"]["kind"] == "connect_failed"
    assert b"no hive answers at http://127.0.0.1:1/mcp" in said
    assert b"stray" in aside
