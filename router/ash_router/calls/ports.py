"""The doors to servers inside a sandbox: for programs on the hive's own origin, for browsers on a preview's. Pure.

The caller's credential for the hive never gets to such a server, whoever it is: not the hive's `Authorization`, not
the cookie that opens a preview, no `ash-…` header. On a preview's host `Authorization` is the page's own, and passes.
What a server answers on the hive's own origin cannot act on that origin, and leads to nothing else there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urljoin, urlsplit

from ash_mcp.errors import PortNotAllowed
from ash_router.admission.base import Admitted, Preview
from ash_router.admission.preview_hosts import COOKIES, without_cookie
from ash_router.calls.direct import DirectRequest
from ash_router.calls.door import PORTS_DOOR, TO_INNER_SERVER, Door, HeaderPolicy
from ash_router.http import framing
from ash_router.http.framing import ResponseHead
from ash_router.http.heads import RequestHead
from ash_router.routes import Route

__all__ = ["PREVIEW_DOOR", "at_port", "port_not_allowed", "preview_request_of"]

_FROM_PREVIEW: Final = frozenset(
    {
        b"alt-svc", b"clear-site-data", b"proxy-authenticate", b"public-key-pins", b"set-cookie", b"set-cookie2",
        b"set-login", b"strict-transport-security", b"www-authenticate",
    }
)  # fmt: skip
"""What of a server's answer would act on more than its own origin, or ask for what never gets there; cookies and
challenges are looked at one by one."""

_UNASKED: Final = re.compile(rb"(?:^|[\s,])(?:negotiate|ntlm|kerberos)\b", re.IGNORECASE)
"""Schemes by which a browser may log in as its user of the network without asking."""


@dataclass(frozen=True, slots=True)
class _OfPort(HeaderPolicy):
    """Of one request to a port: `Location` leads below the door, or nowhere."""

    door: str = ""
    """The path of the door to the port, without a slash at its end."""
    url: str = ""
    """What is asked of the server, as it would name it itself."""

    def response_lines(self, head: ResponseHead) -> bytes:
        lines = super(_OfPort, self).response_lines(head)
        found = framing.one(head.headers, b"location")
        led = None if found is None else _below(self.door, self.url, found.decode("latin-1"))
        return lines if led is None else lines + framing.lines_of([(b"location", led.encode("latin-1"))])


@dataclass(frozen=True, slots=True)
class _OfPreview(HeaderPolicy):
    """Of requests to a preview: cookies and `Authorization` are the page's own, but for what opens it or the hive."""

    hides_authorization: bool = False

    def request_lines(self, head: RequestHead) -> bytes:
        lines = super(_OfPreview, self).request_lines(head)
        own = framing.one(head.headers, b"authorization")
        if own is not None and not self.hides_authorization and _UNASKED.match(own) is None:
            lines += framing.lines_of([(b"authorization", own)])
        kept = without_cookie(value for name, value in head.headers if name == b"cookie")
        return lines + framing.lines_of([(b"cookie", kept)]) if kept else lines

    def response_lines(self, head: ResponseHead) -> bytes:
        lines = super(_OfPreview, self).response_lines(head)
        asked = [pair for pair in head.headers if pair[0] == b"www-authenticate" and _UNASKED.search(pair[1]) is None]
        kept = _own_cookies(value for name, value in head.headers if name == b"set-cookie")
        return lines + framing.lines_of([*asked, *kept])


_OF_PREVIEW: Final = _OfPreview(TO_INNER_SERVER, _FROM_PREVIEW, is_denylist=True)
PREVIEW_DOOR: Final = Door(
    b"",
    None,
    _OF_PREVIEW,
    is_mcp=False,
    websocket="taken",
    has_body_cap=False,
    problem_of=framing.unframed_problem,
)
"""The same for browsers, on an origin of its own."""
_HIDING_DOOR: Final = replace(PREVIEW_DOOR, headers=replace(_OF_PREVIEW, hides_authorization=True))


def at_port(direct: DirectRequest, port: int) -> DirectRequest:
    """Return a request at the door of ports, whose `rest` begins with the port, as one to the server there."""
    path, mark, query = direct.rest.partition(b"?")
    path = path.removeprefix(b"/%d" % port) or b"/"
    target = path + mark + query
    authority = f"localhost:{port}"
    below = f"/s/{direct.route.sandbox_id}/ports/{port}"
    policy, url = PORTS_DOOR.headers, f"http://{authority}{target.decode('latin-1')}"
    headers = _OfPort(policy.request, policy.response, is_denylist=True, door=below, url=url)
    return _inside(direct, port, replace(PORTS_DOOR, headers=headers), target, authority)


def preview_request_of(
    route: Route, admitted: Admitted, preview: Preview, method: str, target: bytes
) -> DirectRequest:
    """Return a request to a preview's host as one to the server that is seen there."""
    direct = DirectRequest(admitted.principal, route, method)
    door = _HIDING_DOOR if preview.hides_authorization else PREVIEW_DOOR
    return _inside(direct, preview.port, door, target, preview.authority)


def port_not_allowed(session: str, port: int, allowed: Sequence[int]) -> PortNotAllowed:
    """Return the refusal of a port that a sandbox's spawn did not allow."""
    there = f"only {', '.join(map(str, allowed))}" if allowed else "none"
    return PortNotAllowed(
        f"sandbox {session} was spawned with {there} of its ports open, so not {port}: say ports=[{port}] at the spawn"
    )


def _inside(direct: DirectRequest, port: int, door: Door, target: bytes, authority: str) -> DirectRequest:
    route = direct.route
    if route.endpoint.has_runner:
        route = replace(route, endpoint=route.endpoint.inside(port))
    return DirectRequest(direct.principal, route, direct.method, door, target, port=port, authority=authority)


def _below(door: str, asked: str, location: str) -> str | None:
    """Return where a redirect leads, as a path below a door; None: out of the server, or it could be read in two ways.

    Args:
        asked: The URL that was asked for, by the server's own name.
    """
    try:
        led = urlsplit(urljoin(asked, location))
        port = led.port
    except ValueError:
        return None
    own = urlsplit(asked)
    is_own = led.scheme == "http" and led.hostname in ("localhost", "127.0.0.1") and port == own.port
    path = led.path or "/"
    if not is_own or "\\" in location or "%2e" in path.lower() or "//" in path or {".", ".."} & set(path.split("/")):
        return None
    query = f"?{led.query}" if led.query else ""
    return f"{door}{path}{query}{f'#{led.fragment}' if led.fragment else ''}"


def _own_cookies(values: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the `Set-Cookie` headers that pass: for this very host only, and not those that open previews."""
    kept: list[tuple[bytes, bytes]] = []
    for value in values:
        pair, *attributes = value.split(b";")
        if pair.partition(b"=")[0].strip() in COOKIES:
            continue
        own = [each for each in attributes if each.partition(b"=")[0].strip().lower() != b"domain"]
        kept.append((b"set-cookie", b";".join([pair, *own])))
    return kept
