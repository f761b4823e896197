"""A recipe whose import, and whose restart as a command, wait until a test opens the pipe that GATE names."""

from __future__ import annotations

import os
import signal

from fastmcp import FastMCP

if "DEAF" in os.environ:  # as if the signal came just before the system call, which it then does not interrupt
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with open(os.environ["GATE"], "rb") as _gate:
    _gate.read()

server = FastMCP("gated")


@server.tool
def hello() -> str:
    return "hello"


if __name__ == "__main__":
    server.run("stdio", show_banner=False)
