"""What a spec says beside what its recipe and its caller ask for."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.spawning.recipes import Recipe
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_hub.spawning.specs import fingerprint, spec_for
from ash_mcp.types import SandboxId, SandboxSpec
from ash_router.upstream.call_tokens import CallTokens

TOKENS = CallTokens(Ed25519PrivateKey.generate())


def spec_of(sandbox_id: str = "sbx-one", recipe: Mapping[str, Any] | None = None, **ask: Any) -> SandboxSpec:
    own = Recipe.model_validate({"name": "x", "description": "Test.", "server": {"python": "a:b"}, **(recipe or {})})
    return spec_for(SandboxId(sandbox_id), {}, own, SpawnAsk.model_validate({"recipe": "x", **ask}), TOKENS)


def test_a_spec_holds_the_key_of_its_own_sandbox_and_does_not_show_it() -> None:
    spec = spec_of()
    assert base64.b64decode(spec.key) == TOKENS.sandbox_keys.of(spec.id)
    assert spec_of("sbx-two").key != spec.key
    assert spec.key not in repr(spec) and spec.public_key == TOKENS.public_key


def test_where_it_runs_is_the_recipes_word_unless_the_spawn_says_otherwise() -> None:
    recipe = {"image": "big", "runtime_class": "gvisor", "node_selector": {"pool": "a", "disk": "ssd"}}
    spec = spec_of(recipe=recipe)
    assert (spec.image, spec.runtime_class, spec.node_selector) == ("big", "gvisor", {"pool": "a", "disk": "ssd"})
    spec = spec_of(recipe=recipe, image="small", runtime_class="runc", node_selector={"pool": "b"})
    assert (spec.image, spec.runtime_class, spec.node_selector) == ("small", "runc", {"pool": "b", "disk": "ssd"})


def test_a_callers_variables_are_in_the_spec_of_an_image_without_a_runner_alone_and_are_not_shown() -> None:
    given: dict[str, Any] = {"env": {"A": "1", "B": "1"}, "secrets": {"B": "s3cret"}}
    assert spec_of(**given).variables == {}
    spec = spec_of(recipe={"server": {"image": {"port": 3000}}}, **given)
    assert spec.variables == {"A": "1", "B": "s3cret"} and "s3cret" not in repr(spec)
    assert spec.server == {"image": {"port": 3000, "path": "/mcp"}}
    other = spec_of(recipe={"server": {"image": {"port": 3000}}})
    assert fingerprint(spec) != fingerprint(other), "no warm one could be given them"
