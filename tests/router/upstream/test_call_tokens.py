"""Call tokens bind a call to one sandbox."""

from __future__ import annotations

import base64
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ash_mcp.errors import ConfigError
from ash_mcp.types import new_sandbox_id
from ash_router.upstream.call_tokens import CallTokens, load_hive_key


def test_a_token_names_its_sandbox_and_verifies_with_the_public_key(tmp_path: Path) -> None:
    tokens = CallTokens(load_hive_key(tmp_path / "hive.key"))
    sandbox = new_sandbox_id()
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(tokens.public_key))
    claims = jwt.decode(tokens.mint(sandbox), public, algorithms=["EdDSA"], audience=sandbox, issuer="ash")
    assert claims["aud"] == sandbox
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(tokens.mint(sandbox), public, algorithms=["EdDSA"], audience=new_sandbox_id())


def test_a_token_is_used_again_until_half_its_life_is_over(tmp_path: Path) -> None:
    now = 1000.0
    tokens = CallTokens(load_hive_key(tmp_path / "hive.key"), ttl_seconds=100.0, clock=lambda: now)
    sandbox = new_sandbox_id()
    first = tokens.mint(sandbox)
    now = 1049.0
    assert tokens.mint(sandbox) == first
    now = 1051.0
    assert tokens.mint(sandbox) != first


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "hive.key"
    assert CallTokens(load_hive_key(path)).public_key == CallTokens(load_hive_key(path)).public_key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["hive.key"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hive.key"
    load_hive_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_hive_key(path)
