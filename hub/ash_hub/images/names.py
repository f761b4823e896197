"""The names of images, as docker reads them: `python` is `docker.io/library/python:latest`."""

from __future__ import annotations

import re

from ash_mcp.errors import ConfigError

__all__ = ["full_name", "short_name"]

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_NAME = re.compile(
    rf"(?:(?P<host>(?:[A-Za-z0-9-]+\.)*[A-Za-z0-9-]+(?::\d{{1,5}})?)/)??(?P<path>{_PART}(?:/{_PART})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)
_LONGEST = 400
_HUB = "docker.io"


def full_name(text: str) -> str:
    """Return an image's name with registry, path and tag or digest.

    Raises:
        ConfigError: It is none.
    """
    found = _NAME.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None:
        raise ConfigError(
            f"{text[:_LONGEST]!r} is no name of an image: lower-case parts with slashes between, then a tag, as "
            "python:3.12-slim or registry.example/team/tool:1"
        )
    host, path = found["host"], found["path"]
    if host is None:
        first, _, rest = path.partition("/")
        host, path = (first, rest) if rest and ("." in first or first == "localhost") else (_HUB, path)
    elif "." not in host and ":" not in host and host != "localhost":
        host, path = _HUB, f"{host.lower()}/{path}"
    if host == "index.docker.io":
        host = _HUB
    if host == _HUB and "/" not in path:
        path = f"library/{path}"
    if found["digest"] is not None:
        return f"{host}/{path}@{found['digest']}"
    return f"{host}/{path}:{found['tag'] or 'latest'}"


def short_name(full: str) -> str:
    """Return what people call an image: without the registry that everybody means."""
    short = full.removeprefix(f"{_HUB}/").removeprefix("library/")
    return short if full_name(short) == full else full  # without its registry, `a.b/c` would be of another
