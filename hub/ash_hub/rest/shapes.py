"""Bodies of the seed's REST, as models. Pure.

A field that is null or empty counts as absent, as it did there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ash_hub.spawning.spawn_request import Variables

__all__ = [
    "Deprovisioned",
    "DeprovisionedAll",
    "Failure",
    "Port",
    "Quantities",
    "ResourcesBody",
    "SpawnBody",
    "Spawned",
]

NAME = "^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$"
_CPU: dict[str, Any] = {"pattern": "^([0-9]+(\\.[0-9]{1,3})?|[0-9]+m)?$", "examples": ["500m", "2"]}
_MEMORY: dict[str, Any] = {"pattern": "^([0-9]+([KMG]i?)?)?$", "examples": ["256Mi", "1G"]}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _whole(found: Any) -> Any:
    return int(found) if isinstance(found, float) and found.is_integer() else found


class Port(_Body):
    container_port: Annotated[int, Field(ge=1, le=65535), BeforeValidator(_whole)]
    """JSON has one kind of number: 3000.0 is a port, too."""


class Quantities(_Body):
    cpu: Annotated[str | None, Field(json_schema_extra=_CPU)] = None
    memory: Annotated[str | None, Field(json_schema_extra=_MEMORY)] = None


class ResourcesBody(_Body):
    requests: Quantities | None = None
    limits: Quantities | None = None


class SpawnBody(_Body):
    image: Annotated[
        str,
        Field(min_length=1, description="one that the hive maps to a recipe, or on a cluster an MCP server by itself"),
    ]
    name: Annotated[str | None, Field(pattern=NAME, description="the beginning of the uuid; chosen if absent")] = None
    ports: Annotated[tuple[Port, ...], Field(max_length=64)] | None = None
    env: Annotated[Variables, Field(json_schema_extra={"additionalProperties": False})] | None = None
    resources: ResourcesBody | None = None
    node_selector: dict[str, str] | None = None
    runtime_class: str | None = None


class Spawned(_Body):
    name: str
    uuid: Annotated[str, Field(description="what X-Session-ID names it by")]
    namespace: str
    status: Literal["Ready", "Starting"]
    service_type: Literal["ClusterIP"]
    cluster_ip: str | None = None
    host: str | None = None
    ports: tuple[int, ...] | None = None
    message: str | None = None


class Deprovisioned(_Body):
    message: Literal["Deprovisioned"]
    uuid: str


class DeprovisionedAll(_Body):
    deleted: Annotated[list[str], Field(description="uuids")]
    failed: Annotated[list[str], Field(description="uuids of those that go on")]
    count: Annotated[int, Field(description="how many were deleted")]


class Failure(_Body):
    error: str
