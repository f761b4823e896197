"""The rights of a hive's account on a cluster: `ash doctor` asks for them, the chart's roles grant them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["RIGHTS", "Place", "Right"]


class Place(Enum):
    """Where a right holds."""

    SANDBOXES = "the namespace of the sandboxes"
    HIVE = "the namespace of the hive's keys"
    CLUSTER = "the whole cluster"


@dataclass(frozen=True, slots=True)
class Right:
    """Some verbs on one kind of object."""

    resource: str
    """As a Role writes it, such as `pods/log`."""
    verbs: tuple[str, ...]
    place: Place
    without: str
    """What a hive lacks without it."""
    group: str = ""
    """Of the API; empty is the core group."""
    required: bool = True
    """Whether no sandbox can be made without it."""
    title: str = ""
    """What it is called; empty: as the resource."""


RIGHTS: Final = (
    Right(
        "pods",
        ("get", "list", "watch", "create", "patch", "delete"),
        Place.SANDBOXES,
        "sandboxes cannot be made, followed and ended",
    ),
    Right("pods/log", ("get",), Place.SANDBOXES, "a sandbox's log cannot be read", required=False),
    Right(
        "events",
        ("list", "watch"),
        Place.SANDBOXES,
        "a spawn does not say what it waits for",
        required=False,
    ),
    Right(
        "configmaps",
        ("get", "list", "create", "patch", "delete"),
        Place.SANDBOXES,
        "the tools of sandboxes cannot be kept",
    ),
    Right(
        "secrets",
        ("list", "create", "patch", "delete"),
        Place.SANDBOXES,
        "a spawn cannot give env and secrets to an image that is a server by itself",
        required=False,
        title="secrets of spawns",
    ),
    Right(
        "secrets",
        ("get", "list", "watch", "create", "patch", "delete"),
        Place.HIVE,
        "API keys cannot be kept and followed",
    ),
    Right(
        "runtimeclasses",
        ("get", "list"),
        Place.CLUSTER,
        "a spawn that names an unknown runtime class is not told which there are",
        group="node.k8s.io",
        required=False,
    ),
)
