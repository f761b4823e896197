"""What a spec says beside what its recipe and its caller ask for."""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.spawning.recipes import Recipe
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_hub.spawning.specs import spec_for
from ash_mcp.types import SandboxId, SandboxSpec
from ash_router.upstream.call_tokens import CallTokens


def test_a_spec_holds_the_key_of_its_own_sandbox_and_does_not_show_it() -> None:
    tokens = CallTokens(Ed25519PrivateKey.generate())
    recipe = Recipe.model_validate({"name": "x", "description": "For tests.", "server": {"python": "a:b"}})

    def made(sandbox_id: str) -> SandboxSpec:
        return spec_for(SandboxId(sandbox_id), {}, recipe, SpawnAsk(recipe="x"), tokens)

    spec = made("sbx-one")
    assert base64.b64decode(spec.key) == tokens.sandbox_keys.of(spec.id)
    assert made("sbx-two").key != spec.key
    assert spec.key not in repr(spec) and spec.public_key == tokens.public_key
