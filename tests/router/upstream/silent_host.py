"""In a network of its own: how long a connection waits for a host that has vanished, or whose process reads nothing.

`silent_host.py WHAT SECONDS`, where WHAT is `idle` (nothing is under way), `sent` (a request is), `full` (more of one
than the other side takes) or `stopped` (the same, but the host is there). Prints how long it took to break, or
`never`.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time

from ash_mcp.errors import AshError
from ash_mcp.types import Endpoint
from ash_router.http.framing import ResponseHead
from ash_router.upstream.pool import ConnectionPool


class Waiting:
    """Waits for an answer that does not come."""

    def __init__(self) -> None:
        self.broke = asyncio.Event()

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        raise AssertionError("nobody answers here")

    def broken(self, error: AshError) -> None:
        self.broke.set()


def set_link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


async def main(what: str, seconds: int) -> str:
    set_link("up")
    upstreams = ConnectionPool(
        connect_timeout_seconds=5,
        max_idle=1,
        idle_seconds=60,
        max_head_bytes=1000,
        max_headers=10,
        silent_seconds=seconds,
    )
    waiting = Waiting()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = await upstreams.connect(Endpoint(host="127.0.0.1", port=listener.getsockname()[1]))
        far_end, _ = listener.accept()
        # what of the request is under way when the host vanishes, or not
        body = b"x" * (16 * 2**20) if what in ("full", "stopped") else b""
        head = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (len(body) + 1)
        connection.send(head + body, waiting, more=True)
        await asyncio.sleep(0.5)
        if what != "stopped":
            set_link("down")
        if what == "sent":
            connection.send_more(b"x", more=False)
        began = time.monotonic()
        try:
            async with asyncio.timeout(6 * seconds):
                await waiting.broke.wait()
        except TimeoutError:
            return "never"
        finally:
            far_end.close()
            upstreams.close()
    return f"{time.monotonic() - began:.1f}"


if __name__ == "__main__":
    sys.stdout.write(asyncio.run(main(sys.argv[1], int(sys.argv[2]))))
