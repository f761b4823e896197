"""From a recipe and what a caller asks for, the spec that a backend makes. Pure."""

from __future__ import annotations

import ipaddress

from ash_hub.asks import SpawnAsk
from ash_hub.recipes import Amounts, Recipe
from ash_hub.sandbox import Sandbox
from ash_mcp.types import ResourceAmounts, Resources, SandboxSpec

__all__ = ["RECIPE_MOUNT", "addresses_named", "spec_for"]

RECIPE_MOUNT = "/opt/recipe"
"""Where a recipe's own folder is readable inside a local sandbox."""


def spec_for(sandbox: Sandbox, recipe: Recipe, ask: SpawnAsk, public_key: str) -> SandboxSpec:
    """Return the spec; what the caller asks for goes before what the recipe says.

    The caller's `env` and `secrets` are not in it: they arrive through the runner's claim.
    """
    network = ask.network if ask.network is not None else recipe.network
    return SandboxSpec(
        id=sandbox.id,
        recipe=recipe.name,
        server=recipe.server.model_dump(mode="json", exclude_none=True),
        image=ask.image or recipe.image,
        ports=ask.ports or recipe.ports,
        env=dict(recipe.env),
        resources=Resources(
            requests=_merge(ask.resources.requests, recipe.resources.requests),
            limits=_merge(ask.resources.limits, recipe.resources.limits),
        ),
        node_selector=dict(ask.node_selector),
        runtime_class=ask.runtime_class,
        network=network,
        public_key=public_key,
        mounts={RECIPE_MOUNT: recipe.folder} if recipe.folder is not None else {},
        labels=dict(ask.labels),
        record=sandbox.record(),
    )


def addresses_named(network: str | tuple[str, ...] | None) -> list[str]:
    """Return the entries of a policy that name an address instead of leaving it to public DNS."""
    entries = network if isinstance(network, tuple) else ()
    return [entry for entry in entries if "=" in entry or _is_address(entry)]


def _is_address(entry: str) -> bool:
    host = entry[1:].partition("]")[0] if entry.startswith("[") else entry.rpartition(":")[0] or entry
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _merge(asked: Amounts, default: Amounts) -> ResourceAmounts:
    return ResourceAmounts(cpu=asked.cpu or default.cpu, memory=asked.memory or default.memory)
