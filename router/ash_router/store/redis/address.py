"""Redis URLs: parsed into a client, and shown without the password."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from ash_mcp.errors import ConfigError

__all__ = ["Address"]

_MAX_CONNECTIONS: Final = 64
_SENTINEL_PORT: Final = 26379
_FORMS: Final = (
    "redis://[user:password@]host[:port][/database], rediss://… for TLS, unix:///path, or "
    "redis+sentinel://[user:password@]host:port[,host:port…]/service[/database]"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL."""

    url: str
    shown: str
    """The URL without user, password and options: fit for logs."""
    parts: SplitResult
    timeout_seconds: float
    """Bound of one connect and of one answer."""

    @classmethod
    def parse(cls, url: str, timeout_seconds: float) -> Address:
        """Read a URL.

        Raises:
            ConfigError: It is none of the accepted forms.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"):
            raise ConfigError(f"the URL of Redis must be one of: {_FORMS}")
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return cls(url, shown, parts, timeout_seconds)

    def client(self) -> tuple[Redis, Sentinel | None]:
        """Return a client that connects when it is used, and the sentinels that it asks, to be closed after it.

        Raises:
            ConfigError: The URL has options that the client does not know, or lacks something.
        """
        try:
            if self.parts.scheme.endswith("+sentinel"):
                client, sentinel = self._by_sentinels()
            else:
                client, sentinel = cast("Any", Redis).from_url(self.url, **self._bounds()), None
            client.connection_pool.make_connection()  # which looks at the options, and doesn't connect
            return client, sentinel
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"the URL of Redis cannot be used ({exc}); accepted are: {_FORMS}") from exc

    def _bounds(self) -> dict[str, Any]:
        keepalive = {} if self.parts.scheme == "unix" else {"socket_keepalive": True}
        return keepalive | {
            "socket_timeout": self.timeout_seconds,
            "socket_connect_timeout": self.timeout_seconds,
            "retry": Retry(NoBackoff(), 0),  # `Link` repeats, and knows for how long
            "protocol": 2,
            "decode_responses": True,
            "max_connections": _MAX_CONNECTIONS,
            "client_name": "ash",
        }

    def _by_sentinels(self) -> tuple[Redis, Sentinel]:
        service, _, database = self.parts.path.strip("/").partition("/")
        hosts = [_host(text) for text in self.parts.netloc.rpartition("@")[2].split(",")]
        if not service or not all(host for host, _ in hosts) or not re.fullmatch(r"\d*", database):
            raise ValueError("it needs the sentinels' addresses and the name of the service")
        options = dict(parse_qsl(self.parts.query, strict_parsing=True)) if self.parts.query else {}
        bounds = self._bounds()
        asking = {key: value for key, value in bounds.items() if key not in ("max_connections", "client_name")}
        for option in ("username", "password"):
            if f"sentinel_{option}" in options:
                asking[option] = options.pop(f"sentinel_{option}")
        user, colon, password = self.parts.netloc.rpartition("@")[0].partition(":")
        if user:
            bounds["username"] = unquote(user)
        if colon:
            bounds["password"] = unquote(password)
        tls = {"ssl": True} if self.parts.scheme.startswith("rediss") else {}
        unknown = [name for name in options if not name.startswith("ssl_")]
        if unknown:
            raise ValueError(f"unknown options: {', '.join(unknown)}")
        tls |= options
        sentinel: Any = Sentinel(hosts, sentinel_kwargs={**asking, **tls})
        return sentinel.master_for(service, db=int(database or 0), **bounds, **tls), sentinel


def _host(text: str) -> tuple[str, int]:
    """Read `host`, `host:port` or `[v6]:port`."""
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:]*))(?::(\d+))?", text)
    if found is None:
        raise ValueError(f"{text!r} is not host:port")
    return found[1] or found[2], int(found[3] or _SENTINEL_PORT)
