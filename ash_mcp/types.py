"""The value types that every part of Ash shares: ids, states, sandbox specs and infos.

All are frozen; none does I/O. Their JSON shapes are in `wire.py`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, NewType

__all__ = [
    "DEFAULT_SCOPE",
    "EVERY_SCOPE",
    "NO_LIMITS",
    "Cause",
    "EndReason",
    "Endpoint",
    "Principal",
    "PrincipalLimits",
    "RecipeName",
    "ResourceAmounts",
    "Resources",
    "RunId",
    "RunInfo",
    "SandboxId",
    "SandboxInfo",
    "SandboxSpec",
    "Scope",
    "SessionName",
    "ShareInfo",
    "SnapshotId",
    "SnapshotInfo",
    "State",
    "Tool",
    "is_run_id",
    "new_run_id",
    "new_sandbox_id",
    "new_snapshot_id",
    "valid_run_name",
    "valid_scope",
    "valid_session_name",
]

SandboxId = NewType("SandboxId", str)
"""`sbx-` and 24 characters of base32: global, unguessable, never reused."""

RunId = NewType("RunId", str)
"""`run-` and 24 characters of base32: one opening of a run, unguessable, never reused."""

SnapshotId = NewType("SnapshotId", str)
"""`snap-` and 24 characters of base32: unguessable, never reused."""

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
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RUN_PREFIX = "run-"
_ID_CHARS = 24

RESERVED_SESSION_NAMES = frozenset(
    {
        "spawn",
        "destroy",
        "list",
        "call",
        "copy",
        "download",
        "extend",
        "network",
        "run",
        "share",
        "snapshot",
        "read",
        "reset",
        "upload",
        "ash",
    }
)
"""The hive's own tool names, up to their first underscore: a session of that name would hide them."""

_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"


def new_sandbox_id() -> SandboxId:
    """Return a fresh sandbox id with 120 bits from the system's random source."""
    return SandboxId("sbx-" + _new_id())


def new_run_id() -> RunId:
    """Return a fresh run id, as random as a sandbox's."""
    return RunId(_RUN_PREFIX + _new_id())


def new_snapshot_id() -> SnapshotId:
    """Return a fresh snapshot id, as random as a sandbox's."""
    return SnapshotId("snap-" + _new_id())


def _new_id() -> str:
    number = secrets.randbits(5 * _ID_CHARS)
    return "".join(_BASE32[(number >> shift) & 31] for shift in range(0, 5 * _ID_CHARS, 5))


def valid_session_name(name: str) -> bool:
    """Return whether `name` can be a session name: `[a-z][a-z0-9]*`, at most 16, not one of the hive's own."""
    return _SESSION_NAME.fullmatch(name) is not None and name not in RESERVED_SESSION_NAMES


def valid_run_name(name: str) -> bool:
    """Return whether `name` can be a run's name; one that looks like a run's id cannot."""
    return _RUN_NAME.fullmatch(name) is not None and not is_run_id(name)


def is_run_id(name: str) -> bool:
    """Return whether `name` has the shape of a run's id."""
    code = name.removeprefix(_RUN_PREFIX)
    return name.startswith(_RUN_PREFIX) and len(code) == _ID_CHARS and set(code) <= set(_BASE32)


def valid_scope(name: str) -> bool:
    """Return whether `name` can be the scope of a sandbox; `*` and the empty name cannot."""
    return _SCOPE.fullmatch(name) is not None


class State(StrEnum):
    """The state of a sandbox; `ash_hub.lifecycle.decide` has the table of steps."""

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
    RUN_ENDED = "run_ended"
    """The lease of its run was not renewed."""
    HIVE_STOPPED = "hive_stopped"
    """The hive was stopped and did not keep its sandboxes."""
    START_FAILED = "start_failed"
    PROCESS_DIED = "process_died"
    """Its main process exited or was killed."""
    LOST = "lost"
    """The backend no longer has it and cannot say why."""


class Cause(StrEnum):
    """Who caused the end of a sandbox, as it was seen from outside: nothing in a sandbox can claim another cause."""

    AGENT = "agent"
    """Its owner destroyed it, or its main process ended without anything outside having ended it."""
    LIMIT = "limit"
    """It reached a limit of its own: memory, disk, time to live, idle time, its run's lease."""
    HIVE = "hive"
    """Ash, its recipes or its settings: an image that cannot be had, a start that takes too long."""
    HOST = "host"
    """What it ran on: its keeper or node is gone, or needed the room."""
    OPERATOR = "operator"
    """A person: the hive was stopped, its pod deleted, its node drained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalLimits:
    """How much of a hive a principal may have at once. None: as the hive has it."""

    sandboxes: int | None = None
    """Living."""
    starting: int | None = None
    """Spawns that are not ready yet, those that wait for a start among them."""
    waiting: int | None = None
    """Spawns that wait for a start."""
    calls: int | None = None
    streams: int | None = None
    """Open ones that only listen, to a sandbox's own endpoint or to the hive."""
    sessions: int | None = None
    """Of the handshake era."""
    backchannels: int | None = None
    """Streams on which a sandbox may ask a session something outside of any call."""
    runs: int | None = None
    """Open ones."""


NO_LIMITS: Final = PrincipalLimits()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a request, as admission found it."""

    subject: str
    """`local` on an unauthenticated loopback hive, otherwise the authenticated subject."""
    bound_scopes: frozenset[str] | None = None
    """The only scopes its key may use; None means all of them."""
    limits: PrincipalLimits = NO_LIMITS
    """By its key; they narrow the hive's own."""
    spawn_policy: str = ""
    """What it may ask for at most when it spawns, by its key, in JSON of the hub's own. Empty: as the hive has it."""
    sandbox: SandboxId | None = None
    """The only sandbox that it sees, whosever that is; it may spawn none. None: those that it owns."""
    share: str | None = None
    """The id of the share that it came with: it has `tools` of `sandbox`, and nothing of the hive itself."""
    tools: frozenset[str] = frozenset()
    """With a share, the only tools that it may list and call, by the sandbox's own names."""

    @property
    def guests(self) -> str | None:
        """With a share, whom it counts for together with all other guests of its sandbox; None for everybody else."""
        return None if self.share is None else f"guests of {self.sandbox}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a sandbox's runner listens: a Unix socket, or a host and a port."""

    unix: str | None = None
    host: str | None = None
    """A name, or a literal address: an IPv6 one stands without brackets."""
    port: int | None = None
    sandbox: SandboxId | None = None
    """Who is to be there, since an address may be another's tomorrow. None: not a sandbox."""
    proves: bool = True
    """Whether a runner of ours listens there, which can prove that it is the sandbox. False: a server that cannot, so
    that whoever has the address is believed."""
    server_path: str | None = None
    """Where an image that is a server by itself serves MCP; it has no runner and proves nothing. None: a runner."""
    inner_port: int | None = None
    """The port inside the sandbox to which its runner hands new connections over. None: they stay with the runner."""
    has_runner: bool = field(init=False, repr=False, compare=False)
    """Whether a runner of ours listens there: with a proof, call tokens, `/_ash/` and both eras of MCP."""
    reaches_runner: bool = field(init=False, repr=False, compare=False)
    """Whether connections to it stay with that runner."""
    mcp_path: str = field(init=False, repr=False, compare=False)
    """The path of its MCP endpoint."""
    authority: str = field(init=False, repr=False, compare=False)
    """What a `Host` header says there; behind a Unix socket there is no host, and it says `sandbox`."""

    def __post_init__(self) -> None:
        if (self.unix is None) == (self.host is None or self.port is None):
            raise ValueError("an endpoint is either a Unix socket path or a host with a port")
        # Fields and not properties: every call reads them.
        object.__setattr__(self, "has_runner", self.server_path is None)
        object.__setattr__(self, "reaches_runner", self.has_runner and self.inner_port is None)
        object.__setattr__(self, "mcp_path", self.server_path or "/mcp")
        object.__setattr__(self, "authority", "sandbox" if self.host is None else _authority(self.host, self.port))

    def __hash__(self) -> int:
        return hash(self.unix or self.host)

    def of(self, sandbox_id: SandboxId) -> Endpoint:
        """Return it as that of one sandbox."""
        return replace(self, sandbox=sandbox_id)

    @property
    def must_prove(self) -> bool:
        """Whether a new connection must begin with a proof. A Unix socket that the backend made needs none."""
        return self.proves and self.has_runner and self.sandbox is not None and self.unix is None

    def inside(self, port: int) -> Endpoint:
        """Return the way to a port inside the sandbox, by its runner."""
        return replace(self, inner_port=port)


def _authority(host: str, port: int | None) -> str:
    host = host.partition("%")[0]  # a zone means something on this machine only
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
    """The order to a backend for one sandbox.

    The caller's environment and secrets arrive after start, through the runner's `/_ash/claim`; only an image that is
    a server by itself has them from its start, by `variables`.
    """

    id: SandboxId
    recipe: str
    server: Mapping[str, Any]
    """How the runner starts the recipe's server: one of `{"python": "module:object"}`,
    `{"http": {"command": [...], "port": n, "path": "/mcp"}}`, `{"stdio": {"command": [...]}}`. Or, for an
    image that is a server by itself, without a runner:
    `{"image": {"port": n, "path": "/mcp", "command"?: [...], "args"?: [...]}}`."""
    image: str | None = None
    ports: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=_empty)
    """The recipe's own environment."""
    variables: Mapping[str, str] = field(default_factory=_empty, repr=False)
    """The caller's environment and secrets, for an image that is a server by itself alone. They go before `env`, and
    are kept where only the sandbox and its hive read them."""
    resources: Resources = Resources()
    node_selector: Mapping[str, str] = field(default_factory=_empty)
    runtime_class: str | None = None
    network: str | tuple[str, ...] = "none"
    """`none`, `internet`, or a tuple of domains."""
    network_note: str = ""
    """Which network it gets and why, where that is less than its recipe asks for; its tools say so."""
    result_bytes: int = 0
    """How long a result of a tool may be before its parts are kept as files inside; 0: of any length."""
    public_key: str = ""
    """Base64 of the raw Ed25519 public key that verifies call tokens; empty means unchecked (tests only)."""
    key: str = field(default="", repr=False)
    """Base64 of the 32 bytes that the sandbox proves itself with on TCP: for the runner's `ASH_SANDBOX_KEY` there, and
    for nothing else that runs inside. A sandbox that is reached by a Unix socket is not given it."""
    mounts: Mapping[str, str] = field(default_factory=_empty)
    """Host directories that the recipe needs readable inside, as sandbox path -> host path (a recipe's own folder)."""
    installed: bool = False
    """Whether its recipe is one of the hive's own, and not a caller's that came with the spawn."""
    snapshot: SnapshotId | None = None
    """What its files begin as; None: as those of any new sandbox."""
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
    """One sandbox as its owner sees it. Times are seconds since the epoch, UTC."""

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
    cause: Cause | None = None
    """Who caused its end; None while it lives."""
    message: str | None = None
    """A sentence to go with the reason, for a person or a model."""
    labels: Mapping[str, str] = field(default_factory=_empty)
    network: str | tuple[str, ...] = "none"
    """What it may reach now: `none`, `internet`, or a tuple of domains."""
    warnings: tuple[str, ...] = ()
    """What this host could not enforce for it."""
    run: str | None = None
    """The name of the run that owns it; None: no run does."""
    ports: tuple[int, ...] = ()
    """The ports inside it that can be reached through the hive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run that is open, as its owner sees it: what is spawned in it ends with it."""

    id: RunId
    name: str
    scope: Scope
    lease_seconds: float
    """How long it lives without being renewed."""
    left_seconds: float
    """What was left of that when the hive answered."""
    opened_at: float
    """Seconds since the epoch, UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareInfo:
    """One share of a sandbox as its owner sees it. Times are seconds since the epoch, UTC."""

    id: str
    """The public part of its token."""
    tools: tuple[str, ...]
    """The tools that it opens, by the sandbox's own names."""
    created_at: float
    expires_at: float | None = None
    """None: when the sandbox ends."""
    ports: tuple[int, ...] = ()
    """The ports inside the sandbox that it opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """A snapshot as its owner sees it: files of a sandbox as they were. Times are seconds since the epoch, UTC."""

    id: SnapshotId
    scope: Scope
    recipe: str
    sandbox_id: SandboxId
    """Of which it was taken."""
    session: SessionName
    """What that was called."""
    size: int
    """What was written since the snapshot that it stands on, in bytes."""
    created_at: float
    expires_at: float
    run: str | None = None
    """The name of the run that it ends with; None: it is of no run."""
