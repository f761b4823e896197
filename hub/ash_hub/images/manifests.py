"""Image manifests and configurations: platform, layers, defaults for commands. Pure.

Everything here was written by whoever made the image: it is read with bounds, and refused where it is not as the
OCI image specification (or docker, where that is older) has it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from ash_mcp.errors import ConfigError, Unsupported

__all__ = [
    "LARGEST_DOCUMENT",
    "Descriptor",
    "ImageConfig",
    "chain_ids",
    "config_of",
    "manifest_of",
    "parsed",
    "refused",
    "require_machine",
]

LARGEST_DOCUMENT = 4 * 1024 * 1024
"""Of a manifest or configuration, in bytes."""
MOST_LAYERS = 127
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
"""As images name them -> as the kernel does."""
_MOST_VARIABLES, _LONGEST_TEXT = 1000, 64 * 1024
"""Text has a bound since the kernel gives no program a variable of more than 128 KiB, and the runner's is one."""
_LONGEST_PATH = 4095
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""NUL, and halves of characters, which JSON can have and an environment or path cannot."""
_VARIABLE = re.compile(r"[^\0=]+")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A part of an image by its digest."""

    digest: str
    media_type: str = ""
    platform: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    """What an index calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What commands of an image get."""

    env: Mapping[str, str] = field(default_factory=dict[str, str])
    user: str = ""
    """A name or number, and perhaps a group after a colon; empty: root."""
    workdir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> ImageConfig:
        words = {name: tuple(given[name]) for name in ("entrypoint", "cmd")}
        return cls(**dict[str, Any](given, **words))


def refused(why: str) -> ConfigError:
    """Return the error for an image that is not taken."""
    return ConfigError(f"the image is refused: {why}")


def parsed(document: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: It is none.
    """
    try:
        found = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise refused(f"its {what} is not JSON") from error
    if not isinstance(found, dict):
        raise refused(f"its {what} is not a JSON object")
    return cast("dict[str, Any]", found)


def descriptors(given: Any, what: str) -> list[Descriptor]:
    """Read a list of descriptors.

    Raises:
        ConfigError: One is wrong.
    """
    return [_descriptor(each, what) for each in _list(given, what)]


def _descriptor(given: Any, what: str) -> Descriptor:
    found = _mapping(given, what)
    digest = found.get("digest")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise refused(f"a digest of its {what} is none of SHA-256")
    named = _mapping(found.get("annotations") or {}, what)
    name = named.get("io.containerd.image.name") or named.get("org.opencontainers.image.ref.name") or ""
    platform = _mapping(found.get("platform") or {}, what)
    return Descriptor(digest, str(found.get("mediaType", "")), platform, str(name))


def chosen(found: Sequence[Descriptor], machine: str) -> Descriptor:
    """Return the one of an index that is for a machine.

    Raises:
        Unsupported: There is none; the message names those that there are.
        ConfigError: There are several.
    """
    images = [each for each in found if each.platform.get("os", "linux") != "unknown"]  # those are attestations
    fitting = [each for each in images if not each.platform or _runs_on(each.platform, machine)]
    if not fitting:
        kinds = sorted({f"{each.platform.get('os')}/{each.platform.get('architecture')}" for each in images})
        raise Unsupported(f"the image is for {', '.join(kinds) or 'nothing'}, and this machine is {_called(machine)}")
    if len({each.digest for each in fitting}) > 1:
        names = ", ".join(each.name or each.digest for each in fitting[:10])
        raise refused(f"it is several images ({names}): import an archive or layout of one")
    return fitting[0]


def _runs_on(platform: Mapping[str, Any], machine: str) -> bool:
    architecture = str(platform.get("architecture", ""))
    return platform.get("os", "linux") == "linux" and _ARCHITECTURES.get(architecture, architecture) == machine


def _called(machine: str) -> str:
    named = next((name for name, kernel in _ARCHITECTURES.items() if kernel == machine), machine)
    return f"linux/{named}"


def require_machine(config: Mapping[str, Any], machine: str) -> None:
    """Refuse an image for another machine.

    Raises:
        Unsupported: The message names both.
    """
    if not _runs_on(config, machine):
        of_image = f"{config.get('os', 'linux')}/{config.get('architecture', 'unknown')}"
        raise Unsupported(f"the image is for {of_image}, and this machine is {_called(machine)}")


def manifest_of(document: Mapping[str, Any]) -> tuple[Descriptor, list[Descriptor]]:
    """Return the configuration and the layers that a manifest names, the lowest first.

    Raises:
        ConfigError: It is no manifest of an image.
    """
    return _descriptor(document.get("config"), "manifest"), descriptors(document.get("layers"), "manifest")


def diff_ids_of(config: Mapping[str, Any]) -> list[str]:
    """Return the digests of the unpacked layers, the lowest first.

    Raises:
        ConfigError: They are wrong, or too many.
    """
    found = _list(_mapping(config.get("rootfs") or {}, "configuration").get("diff_ids") or [], "configuration")
    if len(found) > MOST_LAYERS:
        raise refused(f"it has {len(found)} layers, and {MOST_LAYERS} is the most")
    for each in found:
        if not isinstance(each, str) or not _DIGEST.fullmatch(each):
            raise refused("a digest of a layer is none of SHA-256")
    return found


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Return a name for each layer on those below it, as the specification makes it."""
    chain: list[str] = []
    for each in diff_ids:
        text = f"{chain[-1]} {each}" if chain else each
        chain.append(f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if chain else each)
    return chain


def config_of(document: Mapping[str, Any]) -> ImageConfig:
    """Return what an image's commands get.

    Raises:
        ConfigError: It is not as the specification has it.
    """
    given = _mapping(document.get("config") or {}, "configuration")
    variables: dict[str, str] = {}
    for each in _words(given.get("Env"), "Env"):
        name, equals, value = each.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise refused(f"{each[:100]!r} of its configuration is no environment variable")
        variables[name] = value
    if len(variables) > _MOST_VARIABLES:
        raise refused(f"its configuration has more than {_MOST_VARIABLES} environment variables")
    if len(json.dumps(variables)) > _LONGEST_TEXT:
        raise refused(f"its environment variables take more than {_LONGEST_TEXT >> 10} KiB")
    workdir = _text(given.get("WorkingDir"), "WorkingDir")
    if ".." in workdir.split("/") or len(workdir.encode()) > _LONGEST_PATH:
        raise refused(f"its working directory is {workdir[:100]!r}")
    return ImageConfig(
        env=variables,
        user=_text(given.get("User"), "User"),
        workdir="/" + workdir.strip("/") if workdir.strip("/") else "",
        entrypoint=_words(given.get("Entrypoint"), "Entrypoint"),
        cmd=_words(given.get("Cmd"), "Cmd"),
    )


def _words(given: Any, what: str) -> tuple[str, ...]:
    return tuple(_text(each, what) for each in _list(given or [], what))


def _text(given: Any, what: str) -> str:
    text = given if given is not None else ""
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT or _NO_TEXT.search(text):
        raise refused(f"its {what} is no text, too long, or has a character that no text of a program can have")
    return text


def _mapping(given: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise refused(f"its {what} has something else where an object belongs")
    return cast("dict[str, Any]", given)


def _list(given: Any, what: str) -> list[Any]:
    if not isinstance(given, list):
        raise refused(f"its {what} has something else where a list belongs")
    return cast("list[Any]", given)
