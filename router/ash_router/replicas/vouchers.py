"""Vouchers: a replica's word to another for the caller of a request that it forwards.

Signed by the hive's Ed25519 key for one replica and for half a minute. A sandbox's call token is for another
audience, so neither passes for the other. Only the internal listener asks for vouchers; elsewhere one is a header
like any that nobody reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Final, cast

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_mcp.errors import Unauthenticated
from ash_mcp.types import Principal, PrincipalLimits, Scope
from ash_mcp.wire import MCP_PATH
from ash_router.admission.base import Admitted, Head, Refusal

__all__ = ["VOUCHER_HEADER", "VoucherAdmission", "Vouchers"]

VOUCHER_HEADER: Final = b"ash-voucher"

_AUDIENCE: Final = "ash-replica"
_TTL_SECONDS: Final = 30
_MAX_CACHED: Final = 2000
_TARGET: Final = MCP_PATH.encode()


class Vouchers:
    """Writes vouchers for others, and takes those that are for this replica."""

    def __init__(self, key: Ed25519PrivateKey, replica_id: str, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._public = key.public_key()
        self._id = replica_id
        self._clock = clock
        self._written: dict[tuple[str, Admitted], tuple[bytes, float]] = {}
        self._taken: dict[bytes, tuple[Admitted, float]] = {}

    def write(self, replica: str, admitted: Admitted) -> bytes:
        """Return a voucher for a caller, good at one replica for at least half of its life."""
        now = self._clock()
        key = (replica, replace(admitted, path=MCP_PATH))
        known = self._written.get(key)
        if known is not None and known[1] > now:
            return known[0]
        bound = admitted.principal.bound_scopes
        claims = {
            "iss": "ash",
            "aud": _AUDIENCE,
            "replica": replica,
            "sub": admitted.principal.subject,
            "bound": None if bound is None else sorted(bound),
            "limits": {name: most for name, most in asdict(admitted.principal.limits).items() if most is not None},
            "spawn": admitted.principal.spawn_policy,
            "sandbox": admitted.principal.sandbox,
            "share": admitted.principal.share,
            "tools": sorted(admitted.principal.tools),
            "scope": admitted.scope,
            "expand": admitted.expand,
            "by": admitted.by,
            "client": admitted.client,
            "url": admitted.url,
            "iat": int(now),
            "exp": int(now) + _TTL_SECONDS,
        }
        voucher = jwt.encode(claims, self._key, algorithm="EdDSA").encode()
        if len(self._written) >= _MAX_CACHED:
            self._written.clear()
        self._written[key] = (voucher, now + _TTL_SECONDS / 2)
        return voucher

    def take(self, voucher: bytes) -> Admitted | None:
        """Return the caller whom a voucher is for; None if it is not good here and now."""
        now = self._clock()
        known = self._taken.get(voucher)
        if known is not None:
            return known[0] if known[1] > now else None
        try:
            claims = jwt.decode(
                voucher,
                self._public,
                algorithms=["EdDSA"],
                audience=_AUDIENCE,
                options={"require": ["aud", "exp"], "verify_exp": False, "verify_iat": False},
            )
            # by the clock that is given, and a voucher for longer than ours are is none of ours
            if claims["replica"] != self._id or not now < claims["exp"] <= now + 2 * _TTL_SECONDS:
                return None
            admitted = _admitted(claims)
        except (jwt.InvalidTokenError, KeyError, TypeError):
            return None
        if len(self._taken) >= _MAX_CACHED:
            self._taken.clear()
        self._taken[voucher] = (admitted, claims["exp"])
        return admitted


class VoucherAdmission:
    """The `Admission` of the internal listener: who comes with a voucher, and nobody else, to `/mcp` only."""

    def __init__(self, vouchers: Vouchers) -> None:
        self._vouchers = vouchers

    def admit(self, head: Head) -> Admitted | Refusal:
        sent = [value for key, value in head.headers if key == VOUCHER_HEADER]
        admitted = self._vouchers.take(sent[0]) if len(sent) == 1 else None
        if admitted is None or head.target != _TARGET:
            return Refusal(
                Unauthenticated("this address is for the replicas of one hive, which have one hive.key and one time")
            )
        return admitted


def _admitted(claims: dict[str, Any]) -> Admitted:
    bound: Any = claims["bound"]
    principal = Principal(
        claims["sub"],
        None if bound is None else frozenset(cast("list[str]", bound)),
        PrincipalLimits(**claims["limits"]),
        claims["spawn"],
        claims["sandbox"],
        claims.get("share"),
        frozenset(cast("list[str]", claims.get("tools", []))),
    )
    scope = Scope(claims["scope"])
    return Admitted(
        principal, scope, MCP_PATH, claims["expand"], claims["by"], claims["client"], claims.get("url", "")
    )
