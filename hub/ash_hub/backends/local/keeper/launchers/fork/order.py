"""Orders to the process that makes a forked sandbox's walls: a plan without environment and command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..plan import Mount, Plan
from ..staging import CAPABILITY_NUMBERS, Staged, place, places_of, staged

__all__ = ["capabilities_of", "walls_order"]


def walls_order(plan: Plan, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return an order of walls in JSON.

    Its `stage` is what is shown of the host (`staging.Staged`), below `place`; `sources` says where there each of the
    `mounts` is, by its number. `layers` has the names of the spaces of each, whose descriptors come with the
    order, and `places` is what `staging.make_places` makes.

    Args:
        data: The plan in JSON.
    """
    things, sources = _by_mount(plan) if plan.identity.users else _by_base(plan)
    return {
        "mounts": data["mounts"],
        "identity": data["identity"],
        "place": place(),
        "stage": things,
        "sources": sources,
        "writable_bytes": plan.writable_bytes,
        "layers": [list(layer) for layer in plan.layers],
        "places": places_of(plan) if plan.layers else [],
    }


def capabilities_of(plan: Plan) -> list[int]:
    """Return the numbers of those that a sandbox keeps."""
    return [CAPABILITY_NUMBERS[name] for name in plan.capabilities] if plan.identity.users else []


def _by_mount(plan: Plan) -> tuple[list[Staged], dict[str, str]]:
    things = staged(plan)
    return things, {thing.name: thing.name for thing in things}


def _by_base(plan: Plan) -> tuple[list[Staged], dict[str, str]]:
    """Stage each directory once, whatever is shown of it: nothing is mapped, and a file keeps the overlay's inode."""
    names: dict[str, str] = {}
    things: list[Staged] = []
    sources: dict[str, str] = {}
    for number, mount in enumerate(plan.mounts):
        if mount.kind == "bind" and os.path.exists(base := _base_of(mount)):
            if base not in names:
                names[base] = f"base{len(names)}"
                things.append(Staged(base, names[base], "overlay" if mount.overlay is not None else "bind"))
            sources[str(number)] = names[base] + mount.source.removeprefix(base)
    return things, sources


def _base_of(mount: Mount) -> str:
    return mount.source if mount.overlay is None else mount.overlay
