"""The keys that a hive has as documents of its backend: its own private key, its egress proxies', and the API keys."""

from __future__ import annotations

import secrets
from typing import Final, TypeVar

import anyio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.backends.documents import MAX_DOCUMENT_BYTES, DocumentKind, Documents
from ash_hub.egress.signing import read_key
from ash_mcp.errors import ConfigError, Conflict, ConnectFailed
from ash_router.admission.api_keys import ApiKey, KeyChange, parse_keys, write_keys
from ash_router.upstream.call_tokens import new_hive_key, read_hive_key

__all__ = ["awaited_hive_key", "change_api_keys", "keep_egress_key", "keep_hive_key", "kept_hive_key", "read_api_keys"]

T = TypeVar("T")

_TRIES: Final = 8
_LOOK_SECONDS: Final = 0.5
_HIVE_KEY: Final = "the hive's document of its own key"


async def keep_hive_key(documents: Documents) -> Ed25519PrivateKey:
    """Return the hive's own key, made if there is none; replicas that start at once get the same one.

    Raises:
        ConfigError: What is there is no such key.
        ConnectFailed: The backend does not answer.
    """
    if (found := await kept_hive_key(documents)) is not None:
        return found
    return read_hive_key(await _kept_first(documents, "hive", new_hive_key()), _HIVE_KEY)


async def keep_egress_key(documents: Documents) -> bytes:
    """Return the key that a hive shares with its egress proxies, made if there is none; raises as `keep_hive_key`."""
    found = await documents.read(DocumentKind.KEYS, "egress")
    if found is None:
        found = await _kept_first(documents, "egress", secrets.token_hex(32).encode())
    try:
        return read_key(found)
    except ValueError as error:
        raise ConfigError(f"{error}; delete the hive's document of it to make a new one") from error


async def _kept_first(documents: Documents, name: str, made: bytes) -> bytes:
    """Keep a key where there is none, and return the one that was first."""
    try:
        await documents.replace(DocumentKind.KEYS, name, made, instead_of=None)
    except Conflict:
        return await documents.read(DocumentKind.KEYS, name) or b""
    return made


async def kept_hive_key(documents: Documents) -> Ed25519PrivateKey | None:
    """Return the hive's own key, or None where no hive has started yet; raises as `keep_hive_key` does."""
    kept = await documents.read(DocumentKind.KEYS, "hive")
    return None if kept is None else read_hive_key(kept, _HIVE_KEY)


async def awaited_hive_key(documents: Documents, seconds: float) -> Ed25519PrivateKey:
    """Return the hive's own key as soon as a hive has made it.

    Raises:
        ConfigError: No hive has started within `seconds`, or what is there is no such key.
        ConnectFailed: The backend does not answer.
    """
    with anyio.move_on_after(seconds):
        while True:
            if (found := await kept_hive_key(documents)) is not None:
                return found
            await anyio.sleep(_LOOK_SECONDS)
    raise ConfigError("no hive has started with this backend yet, so there is no key: start one first")


async def read_api_keys(documents: Documents) -> list[ApiKey]:
    """Return the API keys, the expired ones too.

    Raises:
        ConfigError: What is there holds no keys of this version.
        ConnectFailed: The backend does not answer.
    """
    return _parsed(await documents.read(DocumentKind.KEYS, "keys"))


async def change_api_keys(documents: Documents, change: KeyChange[T]) -> T:
    """Change the API keys in one step, and return what the change returns beside them.

    Raises:
        ConfigError: What is there holds no keys of this version, or there would be too many.
        ConnectFailed: The backend does not answer, and may have made the change; or others change them all the time.
    """
    for _ in range(_TRIES):
        before = await documents.read(DocumentKind.KEYS, "keys")
        keys, result = change(_parsed(before))
        body = write_keys(keys)
        if len(body) > MAX_DOCUMENT_BYTES:
            raise ConfigError("there are too many API keys for one document; revoke those that nobody uses")
        try:
            await documents.replace(DocumentKind.KEYS, "keys", body, instead_of=before)
        except Conflict:
            continue
        return result
    raise ConnectFailed("others change the API keys all the time; try again")


def _parsed(body: bytes | None) -> list[ApiKey]:
    return [] if body is None else parse_keys(body, "the hive's document of API keys")
