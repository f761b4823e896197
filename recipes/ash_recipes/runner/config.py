"""The runner's configuration, read once from its environment and taken out of it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

__all__ = ["PRIVATE_VARIABLES", "ConfigProblem", "ImageDefaults", "Listen", "RunnerConfig", "take_from"]

PRIVATE_VARIABLES = (
    "ASH_LISTEN_FD",
    "ASH_LISTEN",
    "ASH_RUNNER_CONFIG",
    "ASH_SANDBOX_KEY",
    "ASH_EGRESS_TOKEN",
    "ASH_CLAIM_FIRST",
    "PYTHONPATH",
    "PYTHONHOME",
)
"""The runner's own, and the Python path it needed for itself: nothing that it starts sees them."""

KEY_BYTES = 32


class ConfigProblem(Exception):
    """The environment does not say what the runner needs."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen: an inherited descriptor, or an address."""

    descriptor: int | None = None
    host: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDefaults:
    """What commands get of an image that the runner is no part of."""

    env: Mapping[str, str]
    user: str
    """A name or number, perhaps with a group after a colon; empty: root."""
    has_workdir: bool
    """Whether the workspace is a directory of the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    listen: Listen
    sandbox_id: str = ""
    recipe: str = ""
    public_key: str = ""
    """Base64 of the hive's raw Ed25519 key; empty turns the token check off, for tests."""
    key: bytes = field(default=b"", repr=False)
    """The secret that this sandbox and its hive share; empty where nothing but a Unix socket leads here."""
    server: Mapping[str, Any] = field(default_factory=dict[str, Any])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    workspace: Path = Path("/workspace")
    home: Path = Path("/home/sandbox")
    egress: str = ""
    """The hive's egress proxy: a Unix socket, or `host:port`; empty where there is none."""
    egress_token: str = field(default="", repr=False)
    """What proves this sandbox to a proxy at `host:port`."""
    claim_first: bool = False
    """Whether nobody is served before the hive has handed over the environment: the sandbox is known to callers."""
    canary: tuple[str, int] | None = None
    """What the network policy of this sandbox must refuse before it is ready; None where nothing is asked."""
    result_bytes: int = 0
    """How long a result of a tool may be before its parts are kept as files; 0: of any length."""
    image: ImageDefaults | None = None
    """None: commands have the runner's own environment and user."""
    network_note: str = ""
    """Which network there is and why, where that is less than the recipe asks for; empty otherwise."""


def take_from(environ: MutableMapping[str, str], key: str = "", egress_token: str = "") -> RunnerConfig:
    """Read the configuration and remove every variable of `PRIVATE_VARIABLES` from `environ`.

    Args:
        key: Base64 of the 32 bytes of `RunnerConfig.key`.
        egress_token: As `RunnerConfig.egress_token`.

    Raises:
        ConfigProblem: A variable is missing or says something else than docs/runner.md.
    """
    listen = _listen(environ)
    raw = _config(environ.get("ASH_RUNNER_CONFIG", "{}"))
    claim_first = environ.get("ASH_CLAIM_FIRST") == "1"
    for name in PRIVATE_VARIABLES:
        environ.pop(name, None)
    try:
        return RunnerConfig(
            listen=listen,
            sandbox_id=str(raw.get("sandbox_id", "")),
            recipe=str(raw.get("recipe", "")),
            public_key=_checked_key("public_key", str(raw.get("public_key", ""))),
            key=base64.b64decode(_checked_key("ASH_SANDBOX_KEY", key)),
            server=_mapping(raw, "server"),
            env={str(name): str(value) for name, value in _mapping(raw, "env").items()},
            workspace=Path(str(raw.get("workspace") or os.getcwd())),
            egress=_egress(str(raw.get("egress", ""))),
            egress_token=egress_token,
            claim_first=claim_first,
            canary=_address(str(raw["canary"])) if "canary" in raw else None,
            image=_image(raw),
            network_note=str(raw.get("network_note", "")),
            result_bytes=int(raw.get("result_bytes", 0)),
            home=Path(str(raw.get("home") or environ.get("HOME") or os.getcwd())),
        )
    except (TypeError, ValueError) as exc:
        raise ConfigProblem(f"ASH_RUNNER_CONFIG is wrong: {exc}") from exc


def _image(raw: Mapping[str, Any]) -> ImageDefaults | None:
    if raw.get("image") is None:
        return None
    given = _mapping(raw, "image")
    env = {str(name): str(value) for name, value in _mapping(given, "env").items()}
    return ImageDefaults(env=env, user=str(given.get("user", "")), has_workdir=given.get("has_workdir") is True)


def _checked_key(name: str, text: str) -> str:
    if text and len(base64.b64decode(text, validate=True)) != KEY_BYTES:
        raise ConfigProblem(f"{name} is not the base64 of {KEY_BYTES} bytes")
    return text


def _listen(environ: Mapping[str, str]) -> Listen:
    descriptor, address = environ.get("ASH_LISTEN_FD"), environ.get("ASH_LISTEN")
    if (descriptor is None) == (address is None):
        raise ConfigProblem("set one of ASH_LISTEN_FD and ASH_LISTEN")
    if descriptor is not None:
        if not descriptor.isdecimal():
            raise ConfigProblem(f"ASH_LISTEN_FD is {descriptor!r}, not the number of a descriptor")
        return Listen(descriptor=int(descriptor))
    try:
        host, port = _address(address or "")
    except ValueError as exc:
        raise ConfigProblem(f"ASH_LISTEN is wrong: {exc}") from exc
    return Listen(host=host, port=port)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not host:
        raise ValueError(f"{text!r} is not host:port")
    return host.strip("[]"), int(port)


def _egress(place: str) -> str:
    if place and not place.startswith("/"):
        _address(place)
    return place


def _config(text: str) -> Mapping[str, Any]:
    try:
        raw = json.loads(text)
    except ValueError as exc:
        raise ConfigProblem(f"ASH_RUNNER_CONFIG is not JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise ConfigProblem("ASH_RUNNER_CONFIG is not a JSON object")
    return cast("dict[str, Any]", raw)


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value: Any = raw.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigProblem(f"ASH_RUNNER_CONFIG: {name} is not an object")
    return cast("dict[str, Any]", value)
