"""Hosts of previews: `<port>-<label>.<domain>` leads a browser to one port of one share, and to nothing of the hive.

A page that comes from a sandbox may be hostile. So each preview has an origin of its own, which no request to the
hive may name and which no other preview shares, and what opens it is a cookie of that one host. The first visit has
the share's token in its query: it is answered with the cookie and sent on to the same address without the token.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from ash_mcp.errors import AshError, ConfigError, PermissionDenied, Unauthenticated
from ash_mcp.types import DEFAULT_SCOPE
from ash_router.admission.base import Admitted, Head, Preview, Refusal, SentOn
from ash_router.admission.credential_verdict import Known, Verdict
from ash_router.admission.request_scope import address_of
from ash_router.admission.secret_tokens import LABEL
from ash_router.admission.shares import SHARE_PREFIX

__all__ = ["COOKIES", "SECRET_PARAMETER", "PreviewGate", "PreviewNames", "without_cookie"]

SECRET_PARAMETER: Final = "ash_share"
"""Of the query of a first visit."""
COOKIE: Final = "ash-preview"
SECURE_COOKIE: Final = "__Host-ash-preview"
"""Over https: browsers let nobody but this very host set a cookie of such a name."""
COOKIES: Final = frozenset({COOKIE.encode(), SECURE_COOKIE.encode()})

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_NAME: Final = re.compile(rf"(?P<port>[1-9][0-9]{{0,4}})-(?P<label>{LABEL})\.(?P<domain>[a-z0-9.-]+)(:[0-9]{{1,5}})?")
_OWN_PAGE: Final = frozenset({"same-origin", "none"})
_RETRY_SECONDS: Final = 10
_CLOSED: Final = Refusal(
    Unauthenticated(
        "this preview is not open here: open the whole link that was given for it once more, or ask for a new one; "
        "its share may have been revoked or have expired, or its sandbox has ended"
    )
)
"""Whatever the reason is, so that a guess learns nothing."""


@dataclass(frozen=True, slots=True)
class _Host:
    """A host that a preview may have."""

    port: int
    label: str
    share_id: str
    authority: str
    scheme: str

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"


class PreviewNames:
    """The host names of a hive's previews. Browsers reach those below `localhost` on their own machine without more.

    Args:
        wildcard: The URL of further ones, such as `https://*.preview.example.com`; None: there are none.
        tls: Whether the hive itself serves https.
    """

    def __init__(self, wildcard: str | None = None, *, tls: bool = False) -> None:
        self._schemes = {"localhost": "https" if tls else "http"}
        self._wildcard = wildcard
        if wildcard is not None:
            parts = urlsplit(wildcard)
            self._schemes[(parts.hostname or "").removeprefix("*.")] = parts.scheme

    def find(self, head: Head) -> _Host | None:
        """Return the preview's host that a request is for; None: it is for another host."""
        named = head.all(b"host")
        match = _NAME.fullmatch(named[0].lower()) if len(named) == 1 else None
        scheme = self._schemes.get(match["domain"]) if match is not None else None
        if match is None or scheme is None:
            return None
        return _Host(int(match["port"]), match["label"], match["id"], match[0], scheme)

    def url(self, hive: str, port: int, label: str) -> str | None:
        """Return the URL of a preview, without its secret; None: browsers have no way to it from there.

        Args:
            hive: The hive's URL as its caller knows it.
        """
        name = f"{port}-{label}"
        if self._wildcard is not None:
            return f"{self._wildcard.rstrip('/').replace('*', name, 1)}/"
        parts = urlsplit(hive)
        if parts.hostname not in _LOOPBACK:
            return None
        at = f":{parts.port}" if parts.port is not None else ""
        return f"{self._schemes['localhost']}://{name}.localhost{at}/"


class PreviewGate:
    """Decides on requests to previews' hosts.

    Args:
        verify: Verifies the token of a share.
        is_for_hive: Whether an `Authorization` holds a token for the hive.
    """

    def __init__(
        self,
        names: PreviewNames,
        verify: Callable[[str], Verdict | Awaitable[Verdict]],
        is_for_hive: Callable[[str], bool],
    ) -> None:
        self._names = names
        self._verify = verify
        self._is_for_hive = is_for_hive

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal] | None:
        """Return the verdict on a request to a preview's host; None: it is for another host."""
        host = self._names.find(head)
        if host is None:
            return None
        refusal = _foreign(head, host)
        if refusal is not None:
            return refusal
        secrets, rest = _secrets_in(head.target)
        is_first = bool(secrets)
        if is_first and head.method not in ("GET", "HEAD"):
            return Refusal(ConfigError("the link of a preview is opened by GET; what follows goes without its secret"))
        secrets = secrets or _cookies_of(head, host)
        if len(secrets) != 1:
            return _CLOSED
        (token,) = secrets
        verdict = self._verify(token)
        visit = (token, rest) if is_first else None
        return (
            self._later(head, host, verdict, visit)
            if isinstance(verdict, Awaitable)
            else self._decide(head, host, verdict, visit)
        )

    async def _later(
        self, head: Head, host: _Host, verdict: Awaitable[Verdict], visit: tuple[str, bytes] | None
    ) -> Admitted | Refusal:
        try:
            return self._decide(head, host, await verdict, visit)
        except AshError as error:
            return Refusal(error, status=503, headers=(("Retry-After", str(_RETRY_SECONDS)),))

    def _decide(
        self, head: Head, host: _Host, verdict: Verdict, visit: tuple[str, bytes] | None
    ) -> Admitted | Refusal:
        share = verdict.share if isinstance(verdict, Known) else None
        if (
            not isinstance(verdict, Known)
            or share is None
            or share.label != host.label
            or host.port not in share.ports
        ):
            return _CLOSED
        if visit is not None:
            return _sent_on(host, *visit)
        hides = any(map(self._is_for_hive, head.all(b"authorization")))
        preview = Preview(host.port, host.authority, host.scheme, hides)
        client = address_of(head.client)
        return Admitted(verdict.principal, DEFAULT_SCOPE, "/", None, verdict.by, client, host.origin, preview=preview)


def _sent_on(host: _Host, token: str, rest: bytes) -> SentOn:
    secure = host.scheme == "https"
    cookie = (
        f"{SECURE_COOKIE if secure else COOKIE}={token}; Path=/; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"
    )
    headers = (
        ("Location", host.origin + rest.decode("ascii")),  # absolute, since a path may begin with two slashes
        ("Set-Cookie", cookie),
        ("Cache-Control", "no-store"),
        ("Referrer-Policy", "no-referrer"),
    )
    return SentOn(
        Unauthenticated("the preview is open to this browser now; it goes on without the secret"), 303, headers
    )


def _foreign(head: Head, host: _Host) -> Refusal | None:
    """Return the refusal of a request that a page of another origin makes, or None.

    Following a link is no such request. Another preview's page could else make requests with this one's cookie, where
    their domain makes them one site to the browser.
    """
    if any(origin != host.origin for origin in head.all(b"origin")):
        return Refusal(PermissionDenied("pages of other origins may not call this preview"))
    if all(site in _OWN_PAGE for site in head.all(b"sec-fetch-site")):
        return None
    shown = (head.all(b"sec-fetch-mode"), head.all(b"sec-fetch-dest")) == (["navigate"], ["document"])
    if shown and head.method in ("GET", "HEAD"):
        return None
    return Refusal(PermissionDenied("pages of other sites may not embed or call this preview"))


def _secrets_in(target: bytes) -> tuple[list[str], bytes]:
    """Return the secrets in a target's query, and the target without them."""
    path, mark, query = target.partition(b"?")
    begin = f"{SECRET_PARAMETER}=".encode()
    parts = query.split(b"&")
    kept = b"&".join(part for part in parts if not part.startswith(begin))
    found = [part.removeprefix(begin).decode("latin-1") for part in parts if part.startswith(begin)]
    return found, path + (mark + kept if kept or not found else b"")


def _cookies_of(head: Head, host: _Host) -> list[str]:
    """Return the cookies that may open a host, without those that pages of other previews have set for it."""
    name, own = SECURE_COOKIE if host.scheme == "https" else COOKIE, f"{SHARE_PREFIX}{host.share_id}_"
    pairs = (pair.strip().partition("=") for line in head.all(b"cookie") for pair in line.split(";"))
    return [value for key, _, value in pairs if key == name and value.startswith(own)]


def without_cookie(values: Iterable[bytes]) -> bytes:
    """Return the `Cookie` headers of a request as one, without a preview's own cookie; empty if nothing is left."""
    pairs = (pair.strip() for value in values for pair in value.split(b";"))
    return b"; ".join(pair for pair in pairs if pair and pair.partition(b"=")[0].strip() not in COOKIES)
