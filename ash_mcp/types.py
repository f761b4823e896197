"""The values that every part of Ash passes around: ids, states, what a sandbox is asked to be and what it is.

All of them are frozen and hold no I/O. JSON shapes of them are in `wire.py`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

__all__ = [
    "DEFAULT_SCOPE",
    "EVERY_SCOPE",
    "EndReason",
    "Endpoint",
    "Principal",
    "RecipeName",
    "ResourceAmounts",
    "Resources",
    "SandboxId",
    "SandboxInfo",
    "SandboxSpec",
    "Scope",
    "SessionName",
    "State",
    "Tool",
    "new_sandbox_id",
    "valid_scope",
    "valid_session_name",
]

SandboxId = NewType("SandboxId", str)
"""`sbx-` and 24 characters of base32: global, unguessable, never reused."""

SessionName = NewType("SessionName", str)
"""The short name under which a sandbox's tools appear, unique within its owner and scope."""

RecipeName = NewType("RecipeName", str)
Scope = NewType("Scope", str)
"""A partition of one principal's hive."""

DEFAULT_SCOPE = Scope("")
"""The scope of a request that names none."""

EVERY_SCOPE = Scope("*")
"""The filter that shows all of a principal's scopes; never the scope of a sandbox."""

_SESSION_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_SCOPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

RESERVED_SESSION_NAMES = frozenset({"spawn", "destroy", "list", "call", "extend", "read", "ash"})
"""The hive's own tool names, up to their first underscore: a session of that name would hide them."""

_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"


def new_sandbox_id() -> SandboxId:
    """Return a fresh sandbox id with 120 bits from the system's random source."""
    number = secrets.randbits(120)
    return SandboxId("sbx-" + "".join(_BASE32[(number >> shift) & 31] for shift in range(0, 120, 5)))


def valid_session_name(name: str) -> bool:
    """Say whether a caller may choose `name`: `[a-z][a-z0-9]*`, at most 16, not one of the hive's own."""
    return _SESSION_NAME.fullmatch(name) is not None and name not in RESERVED_SESSION_NAMES


def valid_scope(name: str) -> bool:
    """Say whether `name` can be the scope of a sandbox (`*` and the empty name are not)."""
    return _SCOPE.fullmatch(name) is not None


class State(StrEnum):
    """Where a sandbox is in its life; `ash_hub._state` has the table of steps."""

    PENDING = "pending"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    GONE = "gone"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (State.GONE, State.FAILED)


class EndReason(StrEnum):
    """Why a sandbox ended, readable by its owner for an hour afterwards."""

    DESTROYED = "destroyed"
    """Its owner called `destroy`."""
    TTL_EXPIRED = "ttl_expired"
    IDLE_EXPIRED = "idle_expired"
    HIVE_STOPPED = "hive_stopped"
    """The hive was stopped and did not keep its sandboxes."""
    START_FAILED = "start_failed"
    PROCESS_DIED = "process_died"
    """Its main process exited or was killed."""
    LOST = "lost"
    """The backend no longer has it and cannot say why."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request, as admission found it."""

    subject: str
    """`local` on an unauthenticated loopback hive, otherwise the authenticated subject."""
    bound_scopes: frozenset[str] | None = None
    """The only scopes its key may use; None means all of them."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a sandbox's runner listens: a Unix socket, or a host and a port."""

    unix: str | None = None
    host: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        if (self.unix is None) == (self.host is None or self.port is None):
            raise ValueError("an endpoint is either a Unix socket path or a host with a port")


@dataclass(frozen=True, slots=True)
class ResourceAmounts:
    """Amounts in Kubernetes quantities: cpu `500m` or `2`, memory `256Mi` or `1G`; None is the default."""

    cpu: str | None = None
    memory: str | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    requests: ResourceAmounts = ResourceAmounts()
    limits: ResourceAmounts = ResourceAmounts()


def _empty() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """What a backend is asked to make. It holds no secret and nothing of the caller's environment.

    The caller's environment and secrets arrive after start, through the runner's `/_ash/claim`.
    """

    id: SandboxId
    generation: int = 1
    """Counts the incarnations of one id; part of the audience of every call token."""
    recipe: str
    server: Mapping[str, Any]
    """How the runner starts the recipe's server: one of `{"python": "module:object"}`,
    `{"http": {"command": [...], "port": n, "path": "/mcp"}}`, `{"stdio": {"command": [...]}}`."""
    image: str | None = None
    ports: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=_empty)
    """The recipe's own environment."""
    resources: Resources = Resources()
    node_selector: Mapping[str, str] = field(default_factory=_empty)
    runtime_class: str | None = None
    network: str | tuple[str, ...] = "none"
    """`none`, `internet`, or a tuple of domains."""
    public_key: str = ""
    """Base64 of the raw Ed25519 public key that verifies call tokens; empty means unchecked (tests only)."""
    mounts: Mapping[str, str] = field(default_factory=_empty)
    """Host directories that the recipe needs readable inside, as sandbox path -> host path (a recipe's own folder)."""
    labels: Mapping[str, str] = field(default_factory=_empty)
    record: Mapping[str, Any] = field(default_factory=_empty)
    """What the hub needs to rebuild its own state (owner, scope, session, expiry); the backend stores it unread."""


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool of a sandbox as a caller sees it."""

    name: str
    """The name to call it by: `<session>_<tool>` where listed by the hive, the recipe's own name on a sandbox."""
    description: str
    input_schema: Mapping[str, Any]
    output_schema: Mapping[str, Any] | None = None
    annotations: Mapping[str, Any] = field(default_factory=_empty)
    title: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxInfo:
    """What its owner may know of one sandbox. Times are seconds since the epoch, UTC."""

    id: SandboxId
    session: SessionName
    scope: Scope
    recipe: str
    state: State
    created_at: float
    ready_at: float | None = None
    expires_at: float
    """When the TTL ends it."""
    idle_seconds: float | None = None
    """How long it may go without a call; None means for ever."""
    last_call_at: float | None = None
    ended_at: float | None = None
    reason: EndReason | None = None
    """Why it ended; None while it lives."""
    message: str | None = None
    """A sentence to go with the reason, for a person or a model."""
    labels: Mapping[str, str] = field(default_factory=_empty)
    warnings: tuple[str, ...] = ()
    """What this host could not enforce for it."""
