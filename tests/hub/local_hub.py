"""A hub that only holds sandboxes, to be killed: `python -m tests.hub.local_hub ROOT GRACE COUNT [leave] [shared]`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import anyio

from ash_hub.backends.local import LocalBackend
from ash_mcp.types import new_sandbox_id
from tests.hub.backends.local.local_parts import SPEC, descendants, keeper_pid, settings_in, stand_in


async def main(root: Path, grace_seconds: float, count: int, leaves: bool, shared: str | None) -> None:
    settings = settings_in(root, grace_seconds=grace_seconds)
    async with LocalBackend(settings, runtime=stand_in(), shared=shared) as backend:
        for number in range(count):
            spec = replace(SPEC, id=new_sandbox_id(), labels={"number": str(number)}, record={"owner": "local"})
            await backend.create(spec)
        keeper = keeper_pid(backend)
        report = {"keeper": keeper, "processes": descendants(keeper), "ids": [it.id for it in await backend.list()]}
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
        if not leaves:
            await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(
        main,
        Path(sys.argv[1]),
        float(sys.argv[2]),
        int(sys.argv[3]),
        "leave" in sys.argv,
        "tested" if "shared" in sys.argv else None,
    )
