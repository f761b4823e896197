"""A whole hive with many sandboxes that are stand-ins: all of the hub and the router is real, their work is not.

`python -m ash_hub.bench.servers crowd SOCKET COUNT` runs one; tests open one in their own process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio

from ash_hub.app import Hive, open_hive
from ash_hub.backends.memory import MemoryBackend
from ash_hub.face.arguments import SpawnAsk
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from ash_mcp.types import DEFAULT_SCOPE, Endpoint, Principal, SandboxSpec

__all__ = ["RECIPE", "Crowd", "open_crowd"]

RECIPE = "echo"


@dataclass(frozen=True, slots=True)
class Crowd:
    """The hive, and a token for each owner."""

    hive: Hive
    tokens: Mapping[str, str]

    @property
    def port(self) -> int:
        return urlsplit(self.hive.url).port or 0

    async def spawn(self, owner: str, count: int) -> list[str]:
        """Make sandboxes, one after another so that their names are in order, and return their ids."""
        ask = SpawnAsk.model_validate({"recipe": RECIPE})
        made = [
            await self.hive.sandboxes.spawn(Principal(owner), DEFAULT_SCOPE, ask, _no_progress) for _ in range(count)
        ]
        return [sandbox.id for sandbox in made]


@asynccontextmanager
async def open_crowd(folder: Path, socket: str, *owners: str, **settings: Any) -> AsyncGenerator[Crowd]:
    """Serve a hive in `folder` while the context is open, whose sandboxes all are what listens at `socket`."""

    async def serve(spec: SandboxSpec) -> Endpoint:
        del spec
        return Endpoint(unix=socket)

    state_dir = folder / "state"
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    keys = key_file(state_dir)
    tokens = {owner: keys.add(subject=owner)[1] for owner in owners}
    chosen = HubSettings(port=0, state_dir=state_dir, run_dir=folder / "run", log_dir=folder / "log", **settings)
    async with MemoryBackend(serve) as backend, open_hive(chosen, backend) as hive:
        yield Crowd(hive, tokens)


async def _no_progress(done: float, message: str) -> None:
    del done, message
    await anyio.lowlevel.checkpoint()
