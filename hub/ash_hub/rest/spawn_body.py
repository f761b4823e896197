"""From the body of `POST /spawn` to what the hive is asked for. Pure."""

from __future__ import annotations

import json
import math
import re
import secrets
import string
import uuid
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, cast

from pydantic import ValidationError

from ash_hub.rest.shapes import Quantities, SpawnBody
from ash_hub.spawning.recipes import CPU, MEMORY, explain_invalid
from ash_hub.spawning.spawn_request import ImageAsk, SpawnAsk
from ash_mcp.errors import ConfigError
from ash_mcp.quantities import cpu_quantity, memory_quantity

__all__ = ["ask_of", "new_name", "new_uuid", "read_body", "read_key"]

_PORT: Final = 3000
"""Where the servers of the seed's images listen if a spawn names no port."""
_OF_IMAGES: Final[Mapping[str, Any]] = {
    "name": "image",
    "description": "An image that is an MCP server by itself.",
    "start_timeout_seconds": 300,  # images are pulled
    "network": "internet",  # the seed's sandboxes had one
}
_KEY = re.compile(r"[\x21-\x7e]{1,128}")


def read_body(raw: bytes) -> SpawnBody:
    """Read the body of a spawn.

    Raises:
        ConfigError: It is no JSON object, lacks the image, or has a field that is wrong or unknown.
    """
    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError("the body must be a JSON object with at least an image")
    if cast("dict[str, Any]", found).get("image") in (None, ""):
        raise ConfigError("image is required")
    try:
        return SpawnBody.model_validate_json(raw)
    except ValidationError as error:
        raise ConfigError(explain_invalid(error)) from error


def read_key(header: str | None) -> str | None:
    """Return the idempotency key that a request has.

    Raises:
        ConfigError: It is none that a sandbox can have.
    """
    if header is not None and _KEY.fullmatch(header) is None:
        raise ConfigError("Idempotency-Key: 1 to 128 visible characters of ASCII")
    return header


def ask_of(
    body: SpawnBody, name: str, images: Mapping[str, str], key: str | None, *, runs_images: bool = False
) -> SpawnAsk:
    """Return the spawn that a body asks for.

    Args:
        name: Its label.
        images: Patterns of images -> recipes.
        key: Its idempotency key.
        runs_images: Whether an image that no recipe stands for is taken as a server by itself.

    Raises:
        ConfigError: No recipe stands for its image, or a quantity cannot be read.
    """
    recipe = next((recipe for pattern, recipe in images.items() if fnmatchcase(body.image, pattern)), None)
    if recipe is None and not runs_images:
        raise ConfigError(
            f"no recipe of this hive stands for image {body.image!r}; it knows: {', '.join(images) or 'none'}. "
            "Its operator can add one with ASH_HUB_SEED__IMAGES"
        )
    asked = body.resources
    resources = {
        "requests": _amounts(asked.requests if asked is not None else None, "request"),
        "limits": _amounts(asked.limits if asked is not None else None, "limit"),
    }
    ports = [port.container_port for port in body.ports or ()]
    asked_for = {
        "env": body.env or {},
        "ports": ports,
        "resources": resources,
        "node_selector": body.node_selector or {},
        "runtime_class": body.runtime_class or None,
        "labels": {"name": name},
        "idempotency_key": key,
    }
    if recipe is not None:
        return SpawnAsk.model_validate({**asked_for, "recipe": recipe})
    server = {"image": {"port": ports[0] if ports else _PORT}}
    return ImageAsk.model_validate({**asked_for, "image": body.image, "recipe": {**_OF_IMAGES, "server": server}})


def new_name() -> str:
    """Return a name for a sandbox whose caller gave none."""
    return "sandbox-" + "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12))


def new_uuid(name: str) -> str:
    """Return a name that nobody can guess, with 122 bits from the system's random source."""
    return f"{name}-{uuid.uuid4()}"


def _amounts(asked: Quantities | None, what: str) -> dict[str, str | None]:
    if asked is None:
        return {}
    return {
        "cpu": _quantity(f"CPU {what}", asked.cpu, CPU, lambda text: f"{math.ceil(cpu_quantity(text) * 1000)}m"),
        "memory": _quantity(f"memory {what}", asked.memory, MEMORY, lambda text: str(memory_quantity(text))),
    }


def _quantity(what: str, text: str | None, usual: str, plain: Callable[[str], str]) -> str | None:
    """Return a quantity as recipes write it: as it came, or where Kubernetes has more ways to write it, plain."""
    if not text:
        return None
    try:
        number = plain(text)
    except (ConfigError, OverflowError) as error:
        raise ConfigError(f"invalid {what}: {error}") from error
    return text if re.search(usual, text) else number
