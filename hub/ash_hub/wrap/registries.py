"""Package registries of this host's package managers: as addresses without credentials, and as a network policy."""

from __future__ import annotations

import configparser
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ash_hub.egress.addresses import NAMEABLE, kind_of
from ash_mcp.errors import ConfigError

__all__ = ["Registries", "npm_registries", "python_registries"]

_SECONDS = 20.0
_NPM, _PYPI = "https://registry.npmjs.org/", "https://pypi.org/simple"
_FILES_OF = {"pypi.org": ("files.pythonhosted.org",), "registry.npmjs.org": ()}
"""Hosts that a registry's packages are on, where that is another one."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LOCAL_NAME = "registry-of-this-host.test"
_NAME = re.compile(r"[A-Za-z0-9.\-]+")
_OF_UV = {
    "UV_DEFAULT_INDEX": "PIP_INDEX_URL",
    "UV_INDEX_URL": "PIP_INDEX_URL",
    "UV_EXTRA_INDEX_URL": "PIP_EXTRA_INDEX_URL",
}


@dataclass(frozen=True, slots=True)
class Registries:
    """What a package manager behind walls is told."""

    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    network: tuple[str, ...] = ()


def npm_registries(npm: str) -> Registries:
    """Ask npm for its registry and those of scopes."""
    words = [npm, "config", "list", "--json"]
    try:
        said = subprocess.run(words, capture_output=True, timeout=_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{npm} does not say where packages are: {error}; see `npm config list`") from error
    try:
        given: dict[str, Any] = json.loads(said or b"{}")
    except ValueError:
        given = {}
    found = {
        f"npm_config_{key}": _clean(value)
        for key, value in given.items()
        if isinstance(value, str) and (key == "registry" or key.endswith(":registry"))
    }
    found.setdefault("npm_config_registry", _NPM)
    if any(_LOCAL_NAME in url for url in found.values()):
        found["npm_config_replace_registry_host"] = "always"
    return Registries(found, _policy(url for name, url in found.items() if name.endswith("registry")))


def python_registries(environment: Mapping[str, str], files: Sequence[Path] | None = None) -> Registries:
    """Read pip's files and variables, and those of uv that mean the same."""
    found: dict[str, str] = {}
    for path in _pip_files() if files is None else files:
        found.update(_of_file(path))
    for name, meant in (*_OF_UV.items(), *((name, name) for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"))):
        if environment.get(name):
            found[meant] = environment[name]
    found.setdefault("PIP_INDEX_URL", _PYPI)
    clean = {name: " ".join(_clean(url) for url in value.split()) for name, value in found.items()}
    network = _policy(url for value in clean.values() for url in value.split())
    if any(_LOCAL_NAME in url for url in clean.values()):
        clean["PIP_TRUSTED_HOST"] = _LOCAL_NAME  # as pip trusts this host's own, which has no certificate
    return Registries(clean, network)


def _pip_files() -> list[Path]:
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [Path("/etc/pip.conf"), Path("~/.pip/pip.conf").expanduser(), config / "pip" / "pip.conf"]


def _of_file(path: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return {
        f"PIP_{key.upper().replace('-', '_')}": " ".join(parser.get(section, key).split())
        for section in ("global", "install")
        for key in ("index-url", "extra-index-url")
        if parser.has_option(section, key)
    }


def _clean(url: str) -> str:
    """Return an address without credentials, and with a name for this host, since loopback is another place inside."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (it is read here, where what is none is refused)
    except ValueError as error:
        raise ConfigError(f"the address of a registry is none: {error}; see the package manager's settings") from error
    place = parts.netloc.rpartition("@")[2]
    if parts.hostname in _LOOPBACK:
        place = f"{_LOCAL_NAME}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    return urlunsplit(parts._replace(netloc=place))


def _policy(urls: Iterable[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for url in urls:
        parts = urlsplit(url)
        if not parts.hostname or not _NAME.fullmatch(parts.hostname):
            continue
        port = parts.port or (80 if parts.scheme == "http" else 443)
        for host in (parts.hostname, *_FILES_OF.get(parts.hostname, ())):
            found[_entry(host, port)] = None
    return tuple(found)


def _entry(host: str, port: int) -> str:
    """Return the entry of a policy for a host, with its address where that is not public and so must be named."""
    if host == _LOCAL_NAME:
        return f"{host}=127.0.0.1:{port}"
    try:
        address = ip_address(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError):
        address = None
    if address is not None and kind_of(address) in NAMEABLE:
        place = f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"
        return place if str(address) == host else f"{host}={place}"
    return host if port in (80, 443) else f"{host}:{port}"
