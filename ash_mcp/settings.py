"""Settings of a client: the hive's URL, the token, time and size limits."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import SplitResult, urlsplit

from ash_mcp.errors import ConfigError
from ash_mcp.paths import announced_url
from ash_mcp.types import EVERY_SCOPE, valid_scope
from ash_mcp.wire import MCP_PATH

__all__ = ["DEFAULT_URL", "ClientSettings"]

DEFAULT_URL = "http://127.0.0.1:8420/mcp"
"""Where `ash up` serves by default."""

DEFAULT_TIMEOUT_SECONDS = 300.0
"""Long enough for a spawn that pulls an image."""

_ENDPOINT = re.compile(rf"{MCP_PATH}(/in/[^/]+)?/?$")
"""The end of the path of a hive's MCP endpoint, narrowed to a scope or not."""

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """How to reach a hive. Built once and passed down.

    Raises:
        ConfigError: A value can not be used; the message names it.
    """

    url: str = DEFAULT_URL
    """The hive's MCP endpoint; a URL without a path gets `/mcp`."""
    token: str | None = field(default=None, repr=False)
    """Sent as a bearer token; None on a hive without authentication."""
    scope: str | None = None
    """The part of the hive to work in; None is the default scope, `*` lists all of them."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """The bound of a call that is given none."""
    connect_timeout_seconds: float = 10.0
    max_connections: int = 500
    """Calls at the same time; more wait for their turn. Below the usual limit of 1,024 open descriptors."""
    max_reply_bytes: int = 64 * 1024 * 1024
    """The longest answer to one call that is read into memory."""

    def __post_init__(self) -> None:
        parts = _checked_url(self.url)
        if parts.path in ("", "/"):
            object.__setattr__(self, "url", parts._replace(path=MCP_PATH).geturl())
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable() or not self.token):
            raise ConfigError("the token holds characters that no header can carry; check ASH_TOKEN for a line break")
        if self.scope is not None and self.scope not in ("", EVERY_SCOPE) and not valid_scope(self.scope):
            raise ConfigError(f"{self.scope!r} cannot be a scope: letters, digits and ._- only, at most 64")
        for name in ("timeout_seconds", "connect_timeout_seconds", "max_connections", "max_reply_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0")

    @property
    def is_loopback(self) -> bool:
        """Whether the hive is on this machine; the environment's proxies are then not used."""
        return urlsplit(self.url).hostname in _LOOPBACK

    @property
    def base_url(self) -> str:
        """The URL that the hive's endpoint and the doors of its sandboxes are below, without a slash at its end."""
        parts = urlsplit(self.url)
        return parts._replace(path=_ENDPOINT.sub("", parts.path).rstrip("/"), query="").geturl()

    def door_url(self, sandbox_id: str, door: str) -> str:
        """Return the URL of one of a sandbox's doors, such as `files`, beside the hive's endpoint."""
        return f"{self.base_url}/s/{sandbox_id}/{door}"

    @classmethod
    def from_environment(
        cls,
        *,
        url: str | None = None,
        token: str | None = None,
        scope: str | None = None,
        timeout_seconds: float | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Take each argument, else `ASH_URL`, `ASH_TOKEN`, `ASH_SCOPE`, `ASH_TIMEOUT_SECONDS`, else the default.

        Before the default URL comes that of this user's running hive.

        Raises:
            ConfigError: As for the class.
        """
        env = os.environ if environ is None else environ
        return cls(
            url=url or env.get("ASH_URL") or announced_url(env) or DEFAULT_URL,
            token=token or env.get("ASH_TOKEN") or None,
            scope=scope if scope is not None else env.get("ASH_SCOPE") or None,
            timeout_seconds=timeout_seconds if timeout_seconds is not None else _seconds(env, "ASH_TIMEOUT_SECONDS"),
        )


def _checked_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable, parts = False, SplitResult("", "", "", "", "")
    if not usable:
        raise ConfigError(f"{url!r} is not the URL of a hive; it looks like {DEFAULT_URL}")
    return parts


def _seconds(env: Mapping[str, str], name: str) -> float:
    text = env.get(name)
    if not text:
        return DEFAULT_TIMEOUT_SECONDS
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a number of seconds, not {text!r}") from None
