"""The settings of a hive: arguments, then `ASH_HUB_*` in the environment (nested with `__`), then these defaults."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ash_mcp.errors import ConfigError
from ash_mcp.paths import default_run_dir, default_state_dir
from ash_mcp.quantities import cpu_quantity, memory_quantity
from ash_mcp.types import Principal, PrincipalLimits
from ash_router.admission.base import LOCAL
from ash_router.bounds.effective_limits import effective_limit, optional_limit
from ash_router.bounds.limits import DEFAULT_LIMITS, RelayLimits
from ash_router.replicas.membership import split_address
from ash_router.sessions.session_gate import MAX_SESSIONS_PER_PRINCIPAL
from ash_router.store.base import PlaceLimits, RunLimits

__all__ = ["AuthSettings", "HubSettings", "Limits", "OidcSettings", "RelaySettings", "SeedSettings"]

_PREVIEW_URL: Final = re.compile(
    r"(https://\*(\.[a-z0-9-]+)+|http://\*(\.[a-z0-9-]+)*\.localhost)(:[1-9][0-9]{0,4})?/?"
)


class Limits(BaseModel):
    """What one hive holds at most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sandboxes: Annotated[int, Field(ge=1)] = 200
    """Living sandboxes of the whole hive, all its replicas together."""
    sandboxes_per_owner: Annotated[int, Field(ge=1)] | None = None
    """Living sandboxes of one owner. None: three quarters of `sandboxes`, and all of them for the user who runs the
    hive (`local`); so no key keeps all others out."""
    starting: Annotated[int, Field(ge=1)] = 4
    """Sandboxes that start at once; more of them wait. Too many at once is what makes starts fail."""
    waiting: Annotated[int, Field(ge=0)] = 1000
    """Spawns that wait for a start. Owners take turns; beyond it, whoever waits with more than an equal part of
    them is refused, with a time to come back."""

    spawn_count: Annotated[int, Field(ge=1, le=1000)] = 100
    """Sandboxes of one spawn (`count`)."""
    runs: Annotated[int, Field(ge=1)] = 1000
    """Open runs of the whole hive, all its replicas together."""
    runs_per_owner: Annotated[int, Field(ge=1)] = 100
    """Open runs of one owner, over all replicas."""
    snapshots: Annotated[int, Field(ge=0)] = 200
    """Snapshots of the whole hive; 0: none can be taken."""
    snapshots_per_owner: Annotated[int, Field(ge=0)] = 100
    """Snapshots of one owner, over all replicas."""
    snapshot_bytes: Annotated[int, Field(ge=0)] = 8 * 1024**3
    """Of all snapshots together, and of what sandboxes stand on of removed ones; what several share counts once. It is
    in memory."""
    snapshot_bytes_per_owner: Annotated[int, Field(ge=0)] = 4 * 1024**3
    """Of these, of one owner."""
    starting_per_owner: Annotated[int, Field(ge=1)] | None = None
    """Spawns of one owner that are not ready yet, those that wait among them, over all replicas. None: any number."""
    waiting_per_owner: Annotated[int, Field(ge=0)] | None = None
    """Of `waiting`, in each replica. None: an equal part, and what is free of the others'."""
    calls_per_owner: Annotated[int, Field(ge=1)] = DEFAULT_LIMITS.max_in_flight_per_owner
    """Calls of one owner in flight, in each replica (429)."""
    streams_per_owner: Annotated[int, Field(ge=1)] = DEFAULT_LIMITS.max_streams_per_owner
    """Open streams of one owner that only listen, to a sandbox or to the hive, in each replica (429)."""
    sessions_per_owner: Annotated[int, Field(ge=1)] = MAX_SESSIONS_PER_PRINCIPAL
    """MCP sessions of the handshake era of one owner, in each replica (429)."""
    backchannels_per_owner: Annotated[int, Field(ge=1)] = DEFAULT_LIMITS.max_backchannels_per_owner
    """Of one owner's such sessions on sandboxes, those on which the sandbox may ask something, in each replica."""

    shares_per_sandbox: Annotated[int, Field(ge=0, le=16)] = 16
    """Shares of one sandbox that are good at once; 0: none can be made."""
    calls_per_share: Annotated[int, Field(ge=1)] = 32
    """Calls of one guest in flight, in each replica (429)."""
    streams_per_share: Annotated[int, Field(ge=1)] = 16
    """Open streams of one guest that only listen, in each replica (429)."""
    sessions_per_share: Annotated[int, Field(ge=1)] = 16
    """MCP sessions of the handshake era of one guest, in each replica (429)."""

    @property
    def guest(self) -> PrincipalLimits:
        """How much whoever comes with a share may have at once."""
        return PrincipalLimits(
            calls=self.calls_per_share,
            streams=self.streams_per_share,
            sessions=self.sessions_per_share,
            backchannels=self.sessions_per_share,
        )

    def runs_allowed(self, principal: Principal) -> RunLimits:
        """Return how many runs may be open."""
        owner = effective_limit(self.runs_per_owner, principal.limits.runs)
        return RunLimits(owner=owner.most, hive=self.runs, owner_by_key=owner.by_key)

    def places(self, principal: Principal) -> PlaceLimits:
        """Return how many living sandboxes an owner, and the hive, may have; a key's limits narrow the hive's."""
        most = self.sandboxes_per_owner
        if most is None and principal.subject != LOCAL.subject:
            most = max(1, self.sandboxes * 3 // 4)
        owner = optional_limit(most, principal.limits.sandboxes)
        starting = optional_limit(self.starting_per_owner, principal.limits.starting)
        return PlaceLimits(
            owner=None if owner is None else owner.most,
            starting=None if starting is None else starting.most,
            hive=self.sandboxes,
            owner_by_key=owner is not None and owner.by_key,
            starting_by_key=starting is not None and starting.by_key,
        )


def _readable_by(read: Callable[[str], float]) -> AfterValidator:
    """Return a check that a quantity can be read."""

    def check(text: str) -> str:
        try:
            read(text)
        except ConfigError as error:
            raise ValueError(error.message) from error
        return text

    return AfterValidator(check)


NetworkEntry = Annotated[str, Field(max_length=320, pattern=r"^(\*\.)?[A-Za-z0-9._=:\[\]-]+$")]
"""`example.com`, `*.example.com`, either with `:port`; and, where a backend can do that, `address:port` and
`name=address:port` for servers that are not public."""


class SpawnLimits(BaseModel):
    """What a spawn may ask for at most. The hive's own recipes may have more, but for the network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: tuple[str, ...] | None = None
    """Patterns of the images that a spawn may name, such as `registry.test/team/*`. None: any."""
    runtime_classes: tuple[str, ...] | None = None
    """None: any."""
    node_selectors: Mapping[str, tuple[str, ...]] | None = None
    """Node labels that a spawn may select by, and patterns of the values of each. None: any."""
    cpu: Annotated[str, _readable_by(cpu_quantity)] | None = None
    """The most processors, such as `2` or `500m`. None: as the backend has them."""
    memory: Annotated[str, _readable_by(memory_quantity)] | None = None
    """The most memory, such as `4Gi`. None: as the backend has it."""
    network: Literal["none", "internet"] | Annotated[tuple[NetworkEntry, ...], Field(min_length=1)] = "internet"
    """The most that a sandbox may reach: a list bounds every sandbox to these domains, and `none` to nothing."""


class SeedSettings(BaseModel):
    """The REST of the system that Ash began from (`docs/rest.md`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Mapping[str, str] = {"timemagic/rl-mcp:general-*": "general"}
    """Patterns of images that its clients name, and the recipe that each stands for; the first that fits."""
    ready_seconds: Annotated[float, Field(gt=0)] = 120
    """How long a spawn waits for its sandbox; then it says `Starting`, and the start goes on."""
    answer_seconds: Annotated[float, Field(gt=0)] = 180
    """How long a server of that system may take to begin its answer (504), where `ash router` serves its routes."""
    address: str | None = None
    """`address:port` at which the gateway of that system reaches this hive; a literal address, since its control
    plane would delete what a name spells. None: where the hive listens, and if that is everywhere, the address that
    Redis sees it by; nowhere, where the hive speaks TLS, since that gateway does not."""

    @field_validator("address")
    @classmethod
    def _literal(cls, address: str | None) -> str | None:
        if address is not None and ip_address(split_address(address)[0]).is_unspecified:
            raise ValueError("must be an address at which the gateway reaches this hive, not one that means all")
        return address


class RelaySettings(BaseModel):
    """What a connection and a call may take on their way to a sandbox; 413, 431, 408 or 429 say that it was more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: Annotated[int, Field(ge=1024, le=256 * 2**20)] = DEFAULT_LIMITS.max_body_bytes
    """Of a message to the hive's endpoint, held in memory (413). The SDK's own servers, the hive's tools among them,
    take no more than 4 MiB anyway."""
    max_direct_body_bytes: Annotated[int, Field(ge=1024)] = DEFAULT_LIMITS.max_direct_body_bytes
    """Of a request to a sandbox's own endpoint, which passes as it comes (413)."""
    max_head_bytes: Annotated[int, Field(ge=1024, le=2**20)] = DEFAULT_LIMITS.max_head_bytes
    """Of a request's or an answer's head (431)."""
    max_headers: Annotated[int, Field(ge=10, le=10_000)] = DEFAULT_LIMITS.max_headers
    """Header lines in it (431)."""
    head_timeout_seconds: Annotated[float, Field(gt=0)] = DEFAULT_LIMITS.head_timeout_seconds
    """For a head that does not come in one piece (408)."""
    body_timeout_seconds: Annotated[float, Field(gt=0)] = DEFAULT_LIMITS.body_timeout_seconds
    """For a message, or between two pieces of a request to a sandbox's own endpoint (408)."""
    connect_timeout_seconds: Annotated[float, Field(gt=0)] = DEFAULT_LIMITS.connect_timeout_seconds
    """For a connection to a sandbox (504 on its own endpoint)."""
    idle_stream_seconds: Annotated[float, Field(gt=0)] | None = DEFAULT_LIMITS.idle_stream_seconds
    """How long a sandbox may be silent during a call (504, or a typed failure); None for ever."""
    keep_alive_seconds: Annotated[int, Field(ge=1)] = 75
    """How long a connection without a request is kept; then it is closed."""
    max_unfinished_per_owner: Annotated[int, Field(ge=1)] = DEFAULT_LIMITS.max_unfinished_per_owner
    """Messages of one principal whose bodies are still coming (429)."""
    max_unfinished_bytes_per_owner: Annotated[int, Field(ge=1024)] = DEFAULT_LIMITS.max_unfinished_bytes_per_owner
    """Of all those together (429)."""


class OidcSettings(BaseModel):
    """Whose tokens are taken: JWTs of an OpenID provider."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: str
    """Exactly as tokens name it; https, unless on this machine."""
    audience: Annotated[tuple[str, ...], Field(min_length=1)]
    """What tokens for this hive name as theirs, one of these; most providers take the hive's URL, `/mcp` and all."""
    jwks_url: str | None = None
    """Where the provider's keys are; None asks its discovery document."""
    required_scopes: tuple[str, ...] = ()
    """What a token must grant."""
    subject_claim: str = "sub"
    """The claim that names the caller; its owner is `<issuer>#<value>`."""

    @field_validator("issuer", "jwks_url")
    @classmethod
    def _safe(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "https://none")
        near = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and near)):
            raise ValueError("must be an https URL")
        return url


class AuthSettings(BaseModel):
    """Who may come in. API keys need no setting: `ash key new` makes them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    peer_check: bool = True
    """Whether a loopback hive serves only its own user and root where no token is sent; False lets every user in."""
    open_paths: tuple[Literal["/readyz", "/metrics"], ...] = ()
    """What answers without a credential, beside `/healthz`. A loopback hive opens `/readyz` anyway.
    `/readyz/calls` goes with `/readyz`."""
    oidc: OidcSettings | None = None


class HubSettings(BaseSettings):
    """All settings of `ash up`. Durations are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="ASH_HUB_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8420
    """0 takes a free port, which the start-up line names."""
    backend: dict[str, Any] = Field(default_factory=lambda: {"kind": "local"})
    """`kind` chooses the backend; its other settings go beside it (`ASH_HUB_BACKEND__KIND=local`)."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names by which the hive may be addressed."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the hive, exact."""

    @field_validator("backend")
    @classmethod
    def _with_kind(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"kind": "local", **given}  # an option alone does not unsay the default

    @field_validator("advertise")
    @classmethod
    def _reachable(cls, address: str | None) -> str | None:
        if address is not None and split_address(address)[0] in ("0.0.0.0", "::"):
            raise ValueError("must be an address at which other machines reach this one, not one that means all")
        return address

    @field_validator("preview_url")
    @classmethod
    def _a_wildcard(cls, url: str | None) -> str | None:
        if url is not None and _PREVIEW_URL.fullmatch(url) is None:
            raise ValueError("must be https://*.DOMAIN, with a port if need be (and by http only below localhost)")
        return url

    auth: AuthSettings = AuthSettings()
    public_url: str | None = None
    """The hive's URL for its callers, without `/mcp`, where a proxy stands before it."""
    preview_url: str | None = None
    """Where browsers see what sandboxes serve, `https://*.previews.example.com`: the name of each preview stands for
    the star, and the address must lead here as the hive's own does. Beside it, and without it, there are names below
    `localhost`, for browsers on the machine from which the hive is reached as `localhost`."""
    tls_cert: Path | None = None
    """Certificate chain in PEM; with it the hive speaks https. A proxy before the hive can do that instead."""
    tls_key: Path | None = None
    """Its private key; None where the certificate's file holds it too."""
    recipe_dirs: tuple[Path, ...] = ()
    allow_inline_recipes: bool = False
    """Whether a spawn may bring a recipe of its own instead of a name."""
    allow_named_addresses: bool = False
    """Whether a spawn's network list may name addresses (`db.test=10.0.0.7:5432`), by which a sandbox reaches this
    host and private networks. A recipe's list always may: it is the operator's."""
    ttl_seconds: Annotated[float, Field(gt=0)] = 24 * 3600
    """Life of a sandbox from its spawn, where the spawn says nothing."""
    max_ttl_seconds: Annotated[float, Field(gt=0)] = 30 * 24 * 3600
    snapshot_ttl_seconds: Annotated[float, Field(gt=0)] = 3600
    """How long a snapshot is kept where nothing is said; at most `max_ttl_seconds`."""
    idle_seconds: Annotated[float, Field(gt=0)] | None = 30 * 60
    """How long a sandbox lives without a call, where the spawn says nothing; None never."""
    result_bytes: Annotated[int, Field(ge=0)] = 1024 * 1024
    """How long a result of a sandbox's tool may be, where neither its spawn nor its recipe says: parts of longer ones
    are kept as files inside. MCP clients refuse events of more than 1 MiB. 0: of any length."""
    ended_retention_seconds: Annotated[float, Field(ge=0)] = 3600
    """How long its owner can read why a sandbox ended."""
    limits: Limits = Limits()
    spawn: SpawnLimits = SpawnLimits()
    relay: RelaySettings = RelaySettings()
    seed: SeedSettings = SeedSettings()
    seed_ids_are_capabilities: bool = False
    """Whether the uuid that `POST /spawn` gave, as `X-Session-ID` on `/mcp`, opens that sandbox without a key."""
    expand: bool = True
    """Whether `tools/list` shows the sandboxes' tools; a connection can say otherwise with `?expand=`."""
    max_listed_tools: Annotated[int, Field(ge=0)] = 120
    """Over this many tools whole sandboxes are left out of `tools/list`, least recently called first, unless the
    connection asked for `?expand=all`."""
    name_limit: Annotated[int, Field(ge=30, le=64)] = 50
    """Characters of a listed tool name; hosts add a prefix and models stop at 64."""
    list_fetch_seconds: Annotated[float, Field(ge=0, le=10)] = 0.25
    """How long the answer to `spawn` and `destroy` waits for its client, where that listens for changes, to fetch the
    new list of tools. 0 never waits."""
    redis_url: SecretStr | None = None
    """Redis (6.2 or later) or Valkey that hives with the same backend share, so that they are one:
    `redis://user:password@host:port/database`, `rediss://…` for TLS, `redis+sentinel://host:port,…/service`.
    None: this process is the whole hive."""
    redis_prefix: str = "ash"
    """Of all keys and channels there; hives of their own in one database need different ones."""
    advertise: str | None = None
    """`host:port` at which other hives on the same Redis reach this one, to hand it the requests of its sessions; it
    listens there, unencrypted, so that the network between them must be theirs alone. None: a free port of 127.0.0.1,
    which is enough for hives of one machine."""
    keep: bool | None = None
    """Whether a graceful stop leaves the sandboxes running for the next hive of the same state directory or cluster.
    None: on a cluster, where a stop is as a rule an upgrade, and not on one machine."""
    drain_seconds: Annotated[float, Field(gt=0)] = 5
    """How long answers that have begun may take when the hive stops and its callers go on elsewhere, or later."""
    idle_exit_seconds: Annotated[float, Field(gt=0)] | None = None
    """End the hive when it has had neither a sandbox nor a request for so long; None never."""
    state_dir: Path = Field(default_factory=default_state_dir)
    run_dir: Path = Field(default_factory=default_run_dir)
    log_dir: Path | None = None
    """None: `log` below the state directory."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def keeps(self) -> bool:
        """Whether a graceful stop leaves the sandboxes running."""
        return self.keep if self.keep is not None else self.backend["kind"] == "kubernetes"

    @property
    def relay_limits(self) -> RelayLimits:
        return RelayLimits(
            **self.relay.model_dump(exclude={"keep_alive_seconds"}),
            max_in_flight_per_owner=self.limits.calls_per_owner,
            max_streams_per_owner=self.limits.streams_per_owner,
            max_backchannels_per_owner=self.limits.backchannels_per_owner,
        )

    @property
    def logs(self) -> Path:
        return self.log_dir or self.state_dir / "log"
