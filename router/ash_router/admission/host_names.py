"""Checks of `Host` and `Origin`, against DNS rebinding and against requests of foreign web pages.

A foreign page can have its own domain resolve to a loopback address; `Host` is that domain then. It can also send
requests with its own `Origin`. Both are compared exactly, before any credential is looked at.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from ash_mcp import errors
from ash_router.admission.base import Head, Refusal

__all__ = ["NameRules"]


class NameRules:
    """The accepted values of `Host` and `Origin`.

    Args:
        port: Where the hive listens; part of its own origins.
        hosts: Further host names (without port) that a `Host` may name.
        origins: Further origins, exact, that a browser page may have.
        any_address: Take every literal address as `Host`, not only loopback ones. No stranger's page can be served
            under an address of ours, so this is safe wherever each request needs a credential.
        tls: Whether the hive itself serves https.
    """

    def __init__(
        self,
        *,
        port: int,
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        any_address: bool = False,
        tls: bool = False,
    ) -> None:
        self._scheme = "https" if tls else "http"
        self._any_address = any_address
        self._hosts = frozenset({"127.0.0.1", "localhost", "[::1]", *(host.lower() for host in hosts)})
        own = {f"{self._scheme}://{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}
        self._origins = frozenset({*own, *origins})

    def check(self, head: Head) -> Refusal | None:
        """Return the refusal of a request with a wrong `Host` or `Origin`, or None."""
        return self._check_host(head) or self._check_origin(head)

    def base_url(self, head: Head) -> str:
        """Return the hive's URL, without a path, with the host of a request that `check` accepted."""
        return f"{self._scheme}://{head.all(b'host')[0].lower()}"

    def _check_host(self, head: Head) -> Refusal | None:
        named = head.all(b"host")
        if len(named) != 1:
            return Refusal(errors.ConfigError("send exactly one Host header"), status=400)
        name, colon, port = named[0].lower().rpartition(":")
        if not colon or port.endswith("]"):
            name, port = named[0].lower(), "80"
        if not (port.isascii() and port.isdecimal()) or not (name in self._hosts or self._is_address(name)):
            return Refusal(
                errors.PermissionDenied(
                    f"this hive answers only to its own names, not to {named[0]!r}; "
                    "connect to 127.0.0.1, or add the name to ASH_HUB_ALLOWED_HOSTS"
                ),
                status=421,
            )
        return None

    def _is_address(self, name: str) -> bool:
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return (self._any_address or address.is_loopback) and "%" not in name

    def _check_origin(self, head: Head) -> Refusal | None:
        for origin in head.all(b"origin"):
            if origin not in self._origins:
                return Refusal(
                    errors.PermissionDenied(
                        f"pages of origin {origin!r} may not call this hive; add it to ASH_HUB_ALLOWED_ORIGINS"
                    )
                )
        return None
