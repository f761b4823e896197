"""Authentication by the settings: the admission, and the metadata for clients that log in."""

from __future__ import annotations

import ipaddress
import logging
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ash_hub.settings import HubSettings, OidcSettings
from ash_mcp.errors import ConfigError
from ash_mcp.wire import MCP_PATH
from ash_router.admission.api_keys import KeyFile, KeyRing, KeySource
from ash_router.admission.base import Head
from ash_router.admission.bearer import RESOURCE_METADATA_PATH, Credentials
from ash_router.admission.gate import Gate
from ash_router.admission.host_names import NameRules
from ash_router.admission.jwks import ProviderKeys
from ash_router.admission.oidc import Oidc, OidcRules
from ash_router.admission.peers import Peers
from ash_router.admission.preview_hosts import PreviewNames

__all__ = ["Auth", "is_loopback", "key_file", "open_auth", "peer_problem", "require_auth", "require_tls_files"]

log = logging.getLogger("ash.hub")

_NOT_LOOKED_UP: Final = (
    "every user of this machine may use this hive, because it cannot find out who connects ({}); "
    "give the hive keys and other users no access to the machine, or run it on one of your own"
)
_SWITCHED_OFF: Final = "every user of this machine may use this hive (ASH_HUB_AUTH__PEER_CHECK=false)"


@dataclass(frozen=True, slots=True)
class Auth:
    """What guards a hive."""

    gate: Gate
    previews: PreviewNames
    routes: Sequence[Route]
    """Of the hive's description as a protected resource (RFC 9728), by which MCP hosts find where to log in."""
    note: str | None
    """What is weaker here than it should be; None where nothing is."""
    lacks_keys: bool
    """Whether nobody can come in yet, as a key would let them and there is none."""


def key_file(state_dir: Path) -> KeyFile:
    """Return the file of API keys of the hive with that state directory."""
    return KeyFile(state_dir / "keys.json")


def require_auth(settings: HubSettings) -> None:
    """Refuse settings by which the hive would serve strangers without asking who they are, or not as it should.

    Raises:
        ConfigError: What is missing or cannot be used, and what to set.
    """
    require_tls_files(settings)
    if is_loopback(settings.host) or settings.auth.oidc is not None:
        return
    if not KeyRing(key_file(settings.state_dir)).usable():
        raise ConfigError(
            f"the hive does not listen on {settings.host} without authentication: make an API key first "
            "(ash key new), or set ASH_HUB_AUTH__OIDC__ISSUER and ASH_HUB_AUTH__OIDC__AUDIENCE. "
            "A loopback address (--host 127.0.0.1) needs neither"
        )


def open_auth(settings: HubSettings, port: int, keys: KeySource | None = None) -> Auth:
    """Build the guard of a hive that listens on `port`.

    Args:
        keys: Where its API keys are; by default the file in its state directory.

    Raises:
        ConfigError: The API keys cannot be read.
    """
    local = is_loopback(settings.host)
    ring = KeyRing(keys or key_file(settings.state_dir))
    if not local and settings.tls_cert is None:
        log.warning("tokens travel unencrypted unless a proxy before this hive speaks https; see ASH_HUB_TLS_CERT")
    peers, note = _peers(settings) if local else (None, None)
    if note is not None:
        log.warning(note)
    public = urlsplit(settings.public_url).hostname if settings.public_url is not None else None
    names = NameRules(
        port=port,
        hosts=(*settings.allowed_hosts, *((public,) if public else ())),
        origins=settings.allowed_origins,
        any_address=not local,
        tls=settings.tls_cert is not None,
    )
    oidc = settings.auth.oidc
    credentials = Credentials(ring)
    if oidc is not None:
        provider = _oidc(oidc)
        credentials = Credentials(ring, provider, is_issued=provider.is_issued)
    previews = PreviewNames(settings.preview_url, tls=settings.tls_cert is not None)
    gate = Gate(
        names,
        credentials,
        local=local,
        peers=peers,
        open_paths=settings.auth.open_paths,
        public_url=settings.public_url,
        previews=previews,
        has_ended=ring.has_ended,
    )
    lacks_keys = not local and oidc is None and not ring.usable()
    if lacks_keys:
        log.warning("nobody is let in yet: there is no API key that is good; make one (ash key new)")
    return Auth(gate, previews, _routes(gate.base_url, oidc), note, lacks_keys)


def require_tls_files(settings: HubSettings) -> None:
    """Refuse a certificate and a key that cannot be used.

    Raises:
        ConfigError: What is wrong.
    """
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise ConfigError("ASH_HUB_TLS_KEY is of no use without ASH_HUB_TLS_CERT")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as exc:
        raise ConfigError(
            f"{settings.tls_cert} cannot be used as a certificate with its key ({exc.strerror or exc}); "
            "ASH_HUB_TLS_CERT and ASH_HUB_TLS_KEY name PEM files"
        ) from exc


def peer_problem() -> str | None:
    """Say why this host does not tell who connects to a loopback address, or None."""
    return Peers(_own_users()).problem()


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a hive that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own_users() -> frozenset[int]:
    return frozenset({os.geteuid(), 0})


def _peers(settings: HubSettings) -> tuple[Peers | None, str | None]:
    if not settings.auth.peer_check:
        return None, _SWITCHED_OFF
    peers = Peers(_own_users())
    problem = peers.problem()
    return (peers, None) if problem is None else (None, _NOT_LOOKED_UP.format(problem))


def _oidc(oidc: OidcSettings) -> Oidc:
    rules = OidcRules(
        issuer=oidc.issuer,
        audience=oidc.audience,
        required_scopes=oidc.required_scopes,
        subject_claim=oidc.subject_claim,
    )
    return Oidc(rules, ProviderKeys(oidc.issuer, oidc.jwks_url))


def _routes(base_url: Callable[[Head], str], oidc: OidcSettings | None) -> Sequence[Route]:
    async def resource(request: Request) -> Response:
        head = Head(request.method, b"/", [*request.headers.raw], None)
        shape = {
            "resource": base_url(head) + MCP_PATH,
            "resource_name": "Ash, the Agent Sandbox Hive",
            "bearer_methods_supported": ["header"],
        }
        if oidc is not None:
            shape |= {"authorization_servers": [oidc.issuer], "scopes_supported": list(oidc.required_scopes)}
        return JSONResponse(shape, headers={"cache-control": "no-store"})

    return [Route(RESOURCE_METADATA_PATH, resource), Route(RESOURCE_METADATA_PATH + MCP_PATH, resource)]
