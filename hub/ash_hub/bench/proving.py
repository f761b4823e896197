"""Cost of a new connection to a sandbox on TCP: with its proof, beside one without."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import anyio
import anyio.to_thread
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.bench.rows import Row, median
from ash_hub.spawning.runner_client import RunnerClient
from ash_mcp.types import Endpoint, new_sandbox_id
from ash_router.bounds.limits import DEFAULT_LIMITS
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.pool import ConnectionPool

__all__ = ["measure_proofs"]

_RUNNER: Final = "ash_recipes.runner"
_SERVER: Final = {"python": "ash_recipes.echo.server:server"}
_START_SECONDS: Final = 60.0
_SILENT_SECONDS: Final = 30


async def measure_proofs(connections: int) -> Sequence[Row]:
    """Open connections to a real runner, in turns with a proof and without."""
    what = "new connection to a runner on TCP with its proof, beside one without, p50"
    if importlib.util.find_spec(_RUNNER.partition(".")[0]) is None:
        return [Row(what=f"{what} (install ash-mcp[recipes])", unit="ms", hive=math.nan, samples=0)]
    tokens = CallTokens(Ed25519PrivateKey.generate())
    taken: dict[bool, list[float]] = {True: [], False: []}
    async with _runner(tokens) as endpoint:
        upstreams = ConnectionPool(
            connect_timeout_seconds=DEFAULT_LIMITS.connect_timeout_seconds,
            max_idle=1,
            idle_seconds=DEFAULT_LIMITS.idle_upstream_seconds,
            max_head_bytes=DEFAULT_LIMITS.max_head_bytes,
            max_headers=DEFAULT_LIMITS.max_headers,
            silent_seconds=_SILENT_SECONDS,
            keys=tokens.sandbox_keys,
        )
        for _ in range(connections):
            for proves, times in taken.items():
                began = time.perf_counter()
                connection = await upstreams.connect(replace(endpoint, proves=proves))
                times.append(time.perf_counter() - began)
                connection.close()
        upstreams.close()
    p50 = {proves: median(times) * 1000 for proves, times in taken.items()}
    return [Row(what=what, unit="ms", hive=p50[True], direct=p50[False], samples=connections)]


@asynccontextmanager
async def _runner(tokens: CallTokens) -> AsyncGenerator[Endpoint]:
    """Run a sandbox's server on a port of loopback while the context is open, and wait until it answers."""
    sandbox = new_sandbox_id()
    with (
        tempfile.TemporaryDirectory(prefix="ash-bench-", dir="/tmp") as home,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        config = {
            "sandbox_id": sandbox,
            "public_key": tokens.public_key,
            "server": _SERVER,
            "workspace": home,
            "home": home,
        }
        environ = {
            **os.environ,
            "ASH_LISTEN_FD": str(listener.fileno()),
            "ASH_RUNNER_CONFIG": json.dumps(config),
            "ASH_SANDBOX_KEY": base64.b64encode(tokens.sandbox_keys.of(sandbox)).decode(),
        }
        process = subprocess.Popen(  # noqa: ASYNC220 - it only forks
            [sys.executable, "-m", _RUNNER],
            env=environ,
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            endpoint = Endpoint(host="127.0.0.1", port=listener.getsockname()[1]).of(sandbox)
            await RunnerClient(endpoint, tokens, sandbox).wait_ready(_START_SECONDS)
            yield endpoint
        finally:
            process.send_signal(signal.SIGTERM)
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(process.wait)
