"""The request that turns a connection to a runner into one to a port inside its sandbox, and its answer. Pure."""

from __future__ import annotations

from typing import Any, Final, cast

import orjson

from ash_mcp.errors import AshError, ConnectFailed, PortClosed, Unsupported
from ash_mcp.wire import HEADER_TOKEN, PORTS_PATH

__all__ = ["MAX_ANSWER_BYTES", "SECONDS", "opening", "problem_in"]

MAX_ANSWER_BYTES: Final = 4096
SECONDS: Final = 30.0
"""For the answer, since a tool may hold up the sandbox's loop."""


def opening(authority: str, port: int, token: bytes) -> bytes:
    """Return the request for a connection to a port.

    Args:
        authority: The runner's.
        token: The sandbox's.
    """
    begin = f"GET {PORTS_PATH}/{port} HTTP/1.1\r\nhost: {authority}\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    return begin.encode() + f"{HEADER_TOKEN}: ".encode() + token + b"\r\n\r\n"


def problem_in(status: int, body: bytes, port: int) -> AshError | None:
    """Return what a runner's answer says against it; None: the connection is the server's from now on."""
    if status == 200:
        return None
    if status == 404:
        return Unsupported("the image of this sandbox has a runner from before ports could be reached; build it anew")
    if _kind(body) == "port_closed":
        return PortClosed(
            f"nobody listens on port {port} of this sandbox; start a server there, on 127.0.0.1 or on all addresses"
        )
    return ConnectFailed(f"the sandbox did not lead to its port {port} (it answered {status}); try again")


def _kind(body: bytes) -> object:
    try:
        shape: Any = orjson.loads(body)
    except ValueError:
        return None
    error: Any = cast("dict[str, Any]", shape).get("error") if isinstance(shape, dict) else None
    return cast("dict[str, Any]", error).get("kind") if isinstance(error, dict) else None
