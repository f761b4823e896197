"""The hive that is measured: this user's running one, or a private one for the time of the measurement."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio

from ash_hub.settings import HubSettings
from ash_mcp.bridge.background import HiveFiles, UserHive
from ash_mcp.errors import ConfigError
from ash_mcp.paths import HIVE_FILE
from ash_mcp.types import Endpoint, SandboxId
from ash_mcp.wire import HEADER_TOKEN
from ash_router.upstream.call_tokens import CallTokens, load_hive_key

__all__ = ["Target", "open_target"]

_STOP_SECONDS: Final = 120.0
"""Of a thousand sandboxes on a busy machine, too."""
_NOTHING: Final[Mapping[str, str]] = {}


@dataclass(frozen=True, slots=True)
class Target:
    """A hive on this machine, and the way past it to its sandboxes."""

    url: str
    pid: int
    run_dir: Path
    tokens: CallTokens

    @property
    def host(self) -> str:
        """The `Host` that it answers to."""
        return urlsplit(self.url).netloc

    def cpu_seconds(self) -> float:
        """Return the processor time that the hive's process has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def direct(self, sandbox_id: SandboxId) -> tuple[Endpoint, dict[str, str]]:
        """Return where a sandbox's own server listens, and the header that it lets in.

        Raises:
            ConfigError: It has no socket here, as with another backend than the local one.
        """
        socket = next(self.run_dir.glob(f"*/s/{sandbox_id}"), None)
        if socket is None:
            raise ConfigError(f"{sandbox_id} has no socket below {self.run_dir}; only local sandboxes are measured")
        token = self.tokens.mint(sandbox_id).decode()
        return Endpoint(unix=str(socket)), {HEADER_TOKEN: token}


@asynccontextmanager
async def open_target(*, private: bool, environ: Mapping[str, str] = _NOTHING) -> AsyncGenerator[Target]:
    """Find this user's hive, or with `private`, or where none runs, start one that ends with the context.

    Args:
        environ: What one that is started finds in its environment beside this process's own.
    """
    settings = HubSettings()
    url = None if private else await UserHive().find()
    if url is not None:
        yield _target(url, settings.run_dir, settings.state_dir)
        return
    with tempfile.TemporaryDirectory(prefix="ash-bench-", dir="/tmp") as home:
        state_dir, run_dir = Path(home) / "state", Path(home) / "run"
        # what the environment says of sandboxes, limits and recipes counts here, too
        own = {"ASH_HUB_STATE_DIR": str(state_dir), "ASH_HUB_LOG_DIR": str(Path(home) / "log")}
        hive = UserHive(files=HiveFiles(run_dir, Path(home) / "log"), environ={**environ, **own})
        with anyio.CancelScope(shield=True) as starting:  # one that was left while it starts would go on
            target = _target(await hive.find_or_start(), run_dir, state_dir)
            starting.shield = False
            try:
                yield target
            finally:
                starting.shield = True
                await _stop(target.pid)


def _target(url: str, run_dir: Path, state_dir: Path) -> Target:
    said = json.loads((run_dir / HIVE_FILE).read_bytes())
    return Target(url, int(said["pid"]), run_dir, CallTokens(load_hive_key(state_dir / "hive.key")))


async def _stop(pid: int) -> None:
    """End a hive and wait for it, so that nothing of it is left."""
    ended = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGTERM)
        with anyio.move_on_after(_STOP_SECONDS):
            await anyio.wait_readable(ended)
    finally:
        os.close(ended)
