"""The hub's end of the egress proxies: tells them what a sandbox may reach, as its pod says it at that moment.

The API server is asked for every answer, since another replica may have changed the pod a moment ago. A proxy acts on
an answer for `POLICY_LEASE_SECONDS` (`ash_hub/egress/connected_sandboxes.py`), so that a change holds when that time
has gone by.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from typing import Any, Final

import anyio

from ash_hub.backends.documents import Documents
from ash_hub.backends.kept_keys import keep_egress_key
from ash_hub.backends.kubernetes.image_server import server_of
from ash_hub.backends.kubernetes.pods import WayOut, goes_by_proxy
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.egress.connected_sandboxes import POLICY_LEASE_SECONDS
from ash_hub.egress.signing import ANSWER, MOST_ASKED, QUESTION, read_line, token, write_line
from ash_mcp.errors import ConfigError, StartFailed
from ash_mcp.types import SandboxId, SandboxSpec

__all__ = ["POLICY_SECONDS", "WaysOut", "answers", "resolved", "ways_out"]

POLICY_SECONDS: Final = POLICY_LEASE_SECONDS + 0.2
"""When a change was recorded so long ago, no proxy acts on what was before."""

_QUESTION_SECONDS: Final = 5.0
_CONNECT_SECONDS: Final = 3.0
_AT_ONCE: Final = 16
"""Requests to the API server."""
_QUESTION_BYTES: Final = 64 * 1024
_QUIET_SECONDS: Final = 10.0
_log = logging.getLogger("ash.hub")

LookUp = Callable[[SandboxId], Awaitable[Mapping[str, Any] | None]]
"""Returns what a proxy is told of a sandbox; None of one that does not go out by a proxy. Raises `ConnectFailed`."""


class WaysOut:
    """How the sandboxes of a hive get to its egress proxies.

    Args:
        proxy: `host:port` of them.
        key: What the hive shares with them.
    """

    def __init__(self, settings: KubernetesSettings, proxy: str, key: bytes) -> None:
        self._settings = settings
        self._proxy = proxy
        self._key = key

    async def of(self, spec: SandboxSpec) -> WayOut | None:
        """Return that of a sandbox; None of one that does not go out by a proxy.

        Raises:
            StartFailed: The proxies have no address now.
        """
        if server_of(spec) is not None or not goes_by_proxy(spec.network, self._settings):
            return None
        try:
            return WayOut(await resolved(self._proxy), token(self._key, spec.id))
        except OSError as error:
            said = f"the egress proxy {self._proxy} cannot be found: {error.strerror or error}"
            raise StartFailed(said, step="network", retryable=True) from error


@asynccontextmanager
async def ways_out(
    settings: KubernetesSettings, documents: Documents, look_up: LookUp
) -> AsyncGenerator[WaysOut | None]:
    """Answer the egress proxies of a hive while the context is open; its value is None where it has none.

    Raises:
        ConfigError: The place to answer them at cannot be had, or their key not be read.
        ConnectFailed: The key cannot be kept now.
    """
    if settings.egress_proxy is None:
        yield None
        return
    key = await keep_egress_key(documents)
    async with _answering(settings.egress_listen, key, look_up):
        yield WaysOut(settings, settings.egress_proxy, key)


@asynccontextmanager
async def _answering(place: str, key: bytes, look_up: LookUp) -> AsyncGenerator[None]:
    """Answer proxies at `host:port` while the context is open."""

    turns = asyncio.Semaphore(_AT_ONCE)
    told_at = -math.inf

    def complain(error: Exception) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > _QUIET_SECONDS:
            told_at = time.monotonic()
            _log.warning("an egress proxy got no answer: %s", str(error) or type(error).__name__)

    async def about(sandbox: str) -> Mapping[str, Any]:
        async with turns:
            try:
                return {sandbox: await look_up(SandboxId(sandbox))}
            except (ValueError, KeyError, TypeError) as error:  # its pod is not as it was made; the others are
                complain(error)
                return {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                with anyio.fail_after(_QUESTION_SECONDS):
                    question = read_line(key, QUESTION, await reader.readline())
                    asked: Sequence[str] = question["sandboxes"][:MOST_ASKED]
                    said = await asyncio.gather(*(about(each) for each in asked))
                    told = {
                        "nonce": question["nonce"],
                        "sandboxes": {each: told for one in said for each, told in one.items()},
                    }
                    writer.write(write_line(key, ANSWER, told))
                    await writer.drain()
            except Exception as error:  # who is not answered asks again, and lets nothing pass meanwhile
                complain(error)

    host, port = _split(place)
    try:
        server = await asyncio.start_server(answer, host, port, limit=_QUESTION_BYTES)
    except OSError as error:
        raise ConfigError(
            f"the egress proxies cannot be answered at {place}: {error.strerror or error}; choose another place with "
            "ASH_HUB_BACKEND__EGRESS_LISTEN"
        ) from error
    async with server:
        yield


async def resolved(place: str) -> str:
    """Return `host:port` with an address in place of a name: a sandbox looks no names up.

    Raises:
        OSError: The name has none.
    """
    host, port = _split(place)
    found = await asyncio.get_running_loop().getaddrinfo(host, port)
    address = str(found[0][4][0])
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def answers(place: str) -> bool:
    """Say whether something takes connections at `host:port`."""
    with suppress(OSError):  # a TimeoutError is one
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(*_split(place))
        writer.close()
        return True
    return False


def _split(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host.strip("[]"), int(port)
