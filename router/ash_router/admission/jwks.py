"""The signing keys of an OpenID provider: found by its discovery document, fetched with limits, cached, renewed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, cast
from urllib.parse import urlsplit

import anyio
import httpx
import jwt
import orjson

from ash_mcp.errors import AshError, ConnectFailed

__all__ = ["ProviderKeys"]

log = logging.getLogger("ash.router")

_FRESH_SECONDS: Final = 300.0
_STALE_SECONDS: Final = 3600.0
"""How long cached keys are used while the provider cannot be reached."""
_COOL_DOWN_SECONDS: Final = 10.0
"""Between fetches for unknown key ids, so that forged tokens cannot flood the provider with requests."""
_FETCH_SECONDS: Final = 5.0
_MAX_BYTES: Final = 512 * 1024
_ASYMMETRIC: Final = frozenset({"RSA", "EC", "OKP"})
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_DOCUMENTS: Final = ("/.well-known/openid-configuration", "/.well-known/oauth-authorization-server")


class ProviderKeys:
    """The keys of one issuer.

    Args:
        jwks_url: The URL of the keys; None: that of the issuer's discovery document.
    """

    def __init__(
        self,
        issuer: str,
        jwks_url: str | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._monotonic = monotonic
        self._transport = transport
        self._lock = anyio.Lock()
        self._keys: Mapping[str | None, jwt.PyJWK] = {}
        self._fetched_at = -float("inf")
        self._tried_at = -float("inf")

    async def get(self, kid: str | None) -> jwt.PyJWK | None:
        """Return the key with an id, or without an id the issuer's only key; None if the issuer has no such key.

        Raises:
            ConnectFailed: The keys cannot be fetched, and no cached ones are recent enough.
        """
        if self._wants_fetch(kid):
            async with self._lock:
                if self._wants_fetch(kid):  # and nobody else has fetched meanwhile
                    await self._renew()
        return self._find(kid)

    def _find(self, kid: str | None) -> jwt.PyJWK | None:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    def _wants_fetch(self, kid: str | None) -> bool:
        now = self._monotonic()
        if now - self._fetched_at >= _FRESH_SECONDS:
            return True
        return self._find(kid) is None and now - self._tried_at >= _COOL_DOWN_SECONDS

    async def _renew(self) -> None:
        now = self._monotonic()
        if now - self._tried_at >= _COOL_DOWN_SECONDS:
            self._tried_at = now
            try:
                with anyio.fail_after(_FETCH_SECONDS):
                    self._keys = await self._fetch()
                self._fetched_at = now
            except (AshError, TimeoutError, httpx.HTTPError, httpx.InvalidURL, ValueError) as exc:
                log.warning("the keys of %s cannot be fetched: %s", self._issuer, exc or type(exc).__name__)
        if now - self._fetched_at >= _STALE_SECONDS:
            raise ConnectFailed(
                "the hive cannot reach the provider that issued your token, so it cannot check it; try again later"
            )

    async def _fetch(self) -> Mapping[str | None, jwt.PyJWK]:
        near = urlsplit(self._jwks_url or self._issuer).hostname in _LOOPBACK  # no proxy stands before those
        async with httpx.AsyncClient(
            transport=self._transport, trust_env=not near, timeout=_FETCH_SECONDS, follow_redirects=False
        ) as client:
            url = self._jwks_url or await self._discover(client)
            return _usable(await _get_json(client, url))

    async def _discover(self, client: httpx.AsyncClient) -> str:
        problem = ""
        for document in _DOCUMENTS:
            try:
                said = await _get_json(client, self._issuer.rstrip("/") + document)
            except ConnectFailed as exc:
                problem = exc.message
                continue
            if said.get("issuer") != self._issuer:
                raise ConnectFailed(f"its discovery document is of issuer {said.get('issuer')!r}")
            return str(said.get("jwks_uri"))
        raise ConnectFailed(problem)


async def _get_json(client: httpx.AsyncClient, url: str) -> Mapping[str, Any]:
    body = bytearray()
    async with client.stream("GET", url, headers={"accept": "application/json"}) as response:
        if response.status_code != 200:
            raise ConnectFailed(f"{url} answered {response.status_code}")
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > _MAX_BYTES:
                raise ConnectFailed(f"{url} answered more than {_MAX_BYTES} bytes")
    said: Any = orjson.loads(body)
    if not isinstance(said, dict):
        raise ConnectFailed(f"{url} answered no JSON object")
    return cast("Mapping[str, Any]", said)


def _usable(said: Mapping[str, Any]) -> Mapping[str | None, jwt.PyJWK]:
    """Return the keys that can verify signatures, by id; those of unknown kinds are left out."""
    keys: dict[str | None, jwt.PyJWK] = {}
    listed: Any = said.get("keys")
    for raw in cast("list[Any]", listed if isinstance(listed, list) else []):
        fields = cast("dict[str, Any]", raw if isinstance(raw, dict) else {})
        if fields.get("kty") not in _ASYMMETRIC or fields.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(fields)
        except jwt.PyJWTError:
            log.info("a key of the provider is of a kind that is not known here")
            continue
        keys[key.key_id] = key
    if not keys:
        raise ConnectFailed("it offers no key that could have signed a token")
    return keys
