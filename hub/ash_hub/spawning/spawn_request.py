"""The spawn request: the arguments of `spawn` and of the REST door, as a model. Pure.

Field descriptions are written for a model; they become the tool's input schema.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ash_hub.spawning.recipes import Network, Recipe, ResourceLimits

__all__ = ["ImageAsk", "SpawnAsk", "Variables"]

_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
Variables = Annotated[dict[Annotated[str, Field(pattern=_VARIABLE)], str], Field(max_length=256)]
_LABEL = r"^[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?$"
_Labels = Annotated[
    dict[Annotated[str, Field(pattern=_LABEL)], Annotated[str, Field(max_length=256)]], Field(max_length=32)
]


class SpawnAsk(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Annotated[str | Recipe, Field(description="what to make the sandbox from, by name")] = "general"
    session: Annotated[
        str | None,
        Field(description="name for the sandbox, [a-z][a-z0-9]* of at most 16; chosen for you if absent"),
    ] = None
    image: Annotated[str | None, Field(description="container image, where the backend has images")] = None
    snapshot: Annotated[
        str | None,
        Field(min_length=1, max_length=64, description="snapshot to start from: its files, its recipe, its tools"),
    ] = None
    env: Annotated[Variables, Field(description="environment variables inside the sandbox")] = {}
    secrets: Annotated[Variables, Field(description="as env, but never logged, listed or stored")] = {}
    ports: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65535)], ...],
        Field(max_length=64, description="ports of servers inside that share(ports=[...]) may open to a browser"),
    ] = ()
    resources: Annotated[
        ResourceLimits, Field(description="requests and limits of cpu (500m, 2) and memory (256Mi, 1Gi)")
    ] = ResourceLimits()
    node_selector: Annotated[dict[str, str], Field(description="labels of the nodes it may run on (clusters)")] = {}
    runtime_class: Annotated[str | None, Field(description="gvisor, kata-clh, … where the cluster has it")] = None
    network: Annotated[
        Network | None, Field(description="none, internet, or a list of domains; the recipe's if absent")
    ] = None
    result_bytes: Annotated[
        int | None, Field(ge=0, description="tool results longer than this become files inside, and a link; 0: never")
    ] = None
    ttl_seconds: Annotated[float | None, Field(gt=0, description="life from now; the hive's default if absent")] = None
    idle_seconds: Annotated[float | None, Field(gt=0, description="end it after so long without a call")] = None
    labels: Annotated[_Labels, Field(description="your own marks, to list by")] = {}
    run: Annotated[
        str | None, Field(min_length=1, max_length=64, description="name or id of an open run that shall own it")
    ] = None
    idempotency_key: Annotated[
        str | None,
        Field(min_length=1, max_length=128, description="the same key returns the same sandbox, so a retry is safe"),
    ] = None


class ImageAsk(SpawnAsk):
    """The spawn of an image that is an MCP server by itself. A caller names the image; its recipe, inline, is the
    hive's own.
    """
