"""Arguments of the hive's tools, as models. Pure.

Field descriptions are written for a model; they become the tools' input schemas. Whatever takes `session` takes it as
`sandbox`, too, since some frameworks drop arguments that are named as something of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ash_hub.spawning.recipes import Network
from ash_hub.spawning.spawn_request import SpawnAsk
from ash_mcp.errors import ConfigError

__all__ = [
    "CallAsk",
    "DestroyAsk",
    "ExtendAsk",
    "ListAsk",
    "LogsAsk",
    "NetworkAsk",
    "ReadAsk",
    "RunAsk",
    "ShareTerms",
    "SpawnAsk",
    "SpawnSomeAsk",
    "ToolsAsk",
    "with_sandbox",
    "with_session",
]

DEFAULT_LEASE_SECONDS: Final = 600.0
MAX_LEASE_SECONDS: Final = 86_400.0

_Run = Annotated[str, Field(min_length=1, max_length=64)]
_Session = Annotated[str, Field(min_length=1, max_length=128, description="session name or sandbox id")]


def with_session(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with `sandbox` under the name that the models know.

    Raises:
        ConfigError: Both are given, and differ.
    """
    if "sandbox" not in arguments:
        return arguments
    rest = {name: value for name, value in arguments.items() if name != "sandbox"}
    sandbox = arguments["sandbox"]
    if rest.setdefault("session", sandbox) != sandbox:
        raise ConfigError("session and sandbox are the same argument, and yours differ; give one of them")
    return rest


def with_sandbox(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an input schema which says that `session` may be given as `sandbox`."""
    properties: dict[str, Any] = schema.get("properties", {})
    if "session" not in properties:
        return schema
    shown: dict[str, Any] = {}
    for name, shape in properties.items():
        shown[name] = shape
        if name == "session":
            shown["sandbox"] = {**shape, "description": "the same as session; give one of them"}
    required = [name for name in schema.get("required", ()) if name != "session"]
    rest = {key: value for key, value in schema.items() if key != "required"}
    return {**rest, "properties": shown, **({"required": required} if required else {})}


class _Ask(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShareTerms(_Ask):
    """What a share opens that is made with its sandbox, as `ShareAsk` has it."""

    tool_names: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]] | None,
        Field(min_length=1, max_length=256, description="the only tools; absent: all, or with ports none"),
    ] = None
    ports: Annotated[list[int] | None, Field(min_length=1, max_length=64, description="some of the spawn's")] = None
    ttl_seconds: Annotated[
        float | None, Field(gt=0, le=10 * 365 * 86_400, description="absent: as long as the sandbox lives")
    ] = None


class SpawnSomeAsk(SpawnAsk):
    """A spawn of one sandbox, or of several alike."""

    share: Annotated[
        ShareTerms | None, Field(description="share it at once, as the tool share does; the answer has the token")
    ] = None
    count: Annotated[
        int, Field(ge=1, description="how many, all alike; those that fail are listed, the others are made")
    ] = 1
    at_once: Annotated[
        int | None, Field(ge=1, description="with count: how many to start side by side; the hive's if absent")
    ] = None
    deadline_seconds: Annotated[
        float | None, Field(gt=0, description="give up what is not ready by then; it counts as failed")
    ] = None


class RunAsk(_Ask):
    run: Annotated[_Run, Field(description="name of the run; with renew also its run_id")]
    lease_seconds: Annotated[
        float | None,
        Field(ge=1, le=MAX_LEASE_SECONDS, description="how long it lives without being renewed; 600 if absent"),
    ] = None
    renew: Annotated[bool, Field(description="renew the lease of the open run instead of opening one")] = False
    run_id: Annotated[
        _Run | None,
        Field(description="with renew and lease_seconds: which opening, told to a hive that has lost its store, too"),
    ] = None
    idempotency_key: Annotated[
        str | None, Field(min_length=1, max_length=128, description="the same key opens the same run")
    ] = None


class DestroyAsk(_Ask):
    session: Annotated[
        _Session | Annotated[list[_Session], Field(min_length=1, max_length=1000)] | None,
        Field(description="session name or sandbox id, a list of them, or * for all of yours"),
    ] = None
    run: Annotated[
        _Run | None, Field(description="name or id of a run, to end it with all that was spawned in it")
    ] = None

    @model_validator(mode="after")
    def _one(self) -> DestroyAsk:
        if (self.session is None) == (self.run is None):
            raise ValueError("give session or run, one of the two")
        return self


class ExtendAsk(_Ask):
    session: _Session
    ttl_seconds: Annotated[float, Field(gt=0, description="how long it shall live from now")]


class NetworkAsk(_Ask):
    session: _Session
    policy: Annotated[Network, Field(description="none, internet, or a list of domains such as *.pypi.org")]


class ListAsk(_Ask):
    labels: Annotated[dict[str, str] | None, Field(description="only sandboxes that have all of these")] = None
    run: Annotated[_Run | None, Field(description="only sandboxes of the run of that name")] = None
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
