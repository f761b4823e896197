"""What callers ask of the hive, as models: the arguments of its tools and of its REST doors. Pure.

Field descriptions are written for a model; they become the tools' input schemas.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ash_hub.recipes import Network, Recipe, ResourceLimits

__all__ = [
    "CallAsk",
    "DestroyAsk",
    "ExtendAsk",
    "ListAsk",
    "LogsAsk",
    "ReadAsk",
    "SpawnAsk",
    "ToolsAsk",
]

_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_Variables = Annotated[dict[Annotated[str, Field(pattern=_VARIABLE)], str], Field(max_length=256)]
_LABEL = r"^[A-Za-z0-9]([A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?$"
_Labels = Annotated[
    dict[Annotated[str, Field(pattern=_LABEL)], Annotated[str, Field(max_length=256)]], Field(max_length=32)
]
_Session = Annotated[str, Field(min_length=1, max_length=64, description="session name or sandbox id")]


class _Ask(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpawnAsk(_Ask):
    recipe: Annotated[str | Recipe, Field(description="what to make the sandbox from, by name")] = "general"
    session: Annotated[
        str | None,
        Field(description="name for the sandbox, [a-z][a-z0-9]* of at most 16; chosen for you if absent"),
    ] = None
    image: Annotated[str | None, Field(description="container image, where the backend has images")] = None
    env: Annotated[_Variables, Field(description="environment variables inside the sandbox")] = {}
    secrets: Annotated[_Variables, Field(description="as env, but never logged, listed or stored")] = {}
    ports: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65535)], ...], Field(max_length=64, description="ports to expose")
    ] = ()
    resources: Annotated[
        ResourceLimits, Field(description="requests and limits of cpu (500m, 2) and memory (256Mi, 1Gi)")
    ] = ResourceLimits()
    node_selector: Annotated[dict[str, str], Field(description="labels of the nodes it may run on (clusters)")] = {}
    runtime_class: Annotated[str | None, Field(description="gvisor, kata-clh, … where the cluster has it")] = None
    network: Annotated[
        Network | None, Field(description="none, internet, or a list of domains; the recipe's if absent")
    ] = None
    ttl_seconds: Annotated[float | None, Field(gt=0, description="life from now; the hive's default if absent")] = None
    idle_seconds: Annotated[float | None, Field(gt=0, description="end it after so long without a call")] = None
    labels: Annotated[_Labels, Field(description="your own marks, to list by")] = {}
    idempotency_key: Annotated[
        str | None,
        Field(min_length=1, max_length=128, description="the same key returns the same sandbox, so a retry is safe"),
    ] = None


class DestroyAsk(_Ask):
    session: Annotated[
        _Session | Annotated[list[_Session], Field(min_length=1, max_length=1000)],
        Field(description="session name or sandbox id, a list of them, or * for all of yours"),
    ]


class ExtendAsk(_Ask):
    session: _Session
    ttl_seconds: Annotated[float, Field(gt=0, description="how long it shall live from now")]


class ListAsk(_Ask):
    labels: Annotated[dict[str, str] | None, Field(description="only sandboxes that have all of these")] = None
    include_ended: Annotated[bool, Field(description="also those that ended within the hour, and why")] = False


class CallAsk(_Ask):
    session: _Session
    tool: Annotated[str, Field(min_length=1, max_length=256, description="the sandbox's tool, without the session")]
    arguments: Annotated[dict[str, Any], Field(description="arguments of that tool")] = {}


class ReadAsk(_Ask):
    session: _Session
    uri: Annotated[
        str, Field(min_length=1, max_length=4096, description="sandbox://SESSION/PATH, or what a resource_link named")
    ]


class ToolsAsk(_Ask):
    session: _Session


class LogsAsk(_Ask):
    session: _Session
    tail_bytes: Annotated[int, Field(ge=1, le=524_288)] = 65_536
