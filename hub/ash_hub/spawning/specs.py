"""From a recipe and what a caller asks for, the spec that a backend makes. Pure."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ash_hub.spawning.recipes import Amounts, Network, Recipe
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_mcp.types import ResourceAmounts, Resources, SandboxId, SandboxSpec, SnapshotId
from ash_router.upstream.call_tokens import CallTokens

__all__ = ["RECIPE_MOUNT", "addresses_named", "fingerprint", "network_of", "ports_of", "recipe_digest", "spec_for"]

RECIPE_MOUNT = "/opt/recipe"
"""Where a recipe's own folder is readable inside a local sandbox."""


def network_of(recipe: Recipe, ask: SpawnAsk) -> Network:
    """Return the policy that a sandbox starts with."""
    return ask.network if ask.network is not None else recipe.network


def ports_of(recipe: Recipe, ask: SpawnAsk) -> tuple[int, ...]:
    """Return the ports inside a sandbox that the hive leads to, each once."""
    return tuple(dict.fromkeys(ask.ports or recipe.ports))


def spec_for(
    sandbox_id: SandboxId,
    record: Mapping[str, Any],
    recipe: Recipe,
    ask: SpawnAsk,
    tokens: CallTokens,
    *,
    network_note: str = "",
    result_bytes: int = 0,
) -> SandboxSpec:
    """Return the spec; what the caller asks for goes before what the recipe says.

    The caller's `env` and `secrets` are in it only for an image that is a server by itself: others have a runner, to
    which they are handed over.

    Args:
        network_note: `Allowed.network_note`.
        result_bytes: The hive's, where neither says anything.
    """
    network = network_of(recipe, ask)
    return SandboxSpec(
        id=sandbox_id,
        recipe=recipe.name,
        server=recipe.server.model_dump(mode="json", exclude_none=True),
        image=ask.image or recipe.image,
        ports=ports_of(recipe, ask),
        env=dict(recipe.env),
        variables={**ask.env, **ask.secrets} if recipe.server.image is not None else {},
        resources=Resources(
            requests=_merge(ask.resources.requests, recipe.resources.requests),
            limits=_merge(ask.resources.limits, recipe.resources.limits),
        ),
        node_selector={**recipe.node_selector, **ask.node_selector},
        runtime_class=ask.runtime_class or recipe.runtime_class,
        network=network,
        network_note=network_note,
        result_bytes=next(most for most in (ask.result_bytes, recipe.result_bytes, result_bytes) if most is not None),
        public_key=tokens.public_key,
        key=base64.b64encode(tokens.sandbox_keys.of(sandbox_id)).decode(),
        mounts={RECIPE_MOUNT: recipe.folder} if recipe.folder is not None else {},
        installed=isinstance(ask.recipe, str),
        snapshot=SnapshotId(ask.snapshot) if ask.snapshot is not None else None,
        labels=dict(ask.labels),
        record=record,
    )


def recipe_digest(recipe: Recipe) -> str:
    """Return what two recipes have in common whose sandboxes have the same tools."""
    same = recipe.model_dump_json(include={"name", "server", "env", "tools", "folder"})
    return hashlib.sha256(same.encode()).hexdigest()


def fingerprint(spec: SandboxSpec) -> str:
    """Return what a warm sandbox must have in common with a spawn: all of its spec that a claim cannot change."""
    same = replace(spec, id=SandboxId(""), key="", labels={}, record={})
    return hashlib.sha256(json.dumps(asdict(same), sort_keys=True).encode()).hexdigest()


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
