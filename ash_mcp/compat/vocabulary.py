"""The seed's nouns and errors: a config, the sandbox that a server describes, and what may go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ash_mcp.wire import MCP_PATH

__all__ = [
    "ResourceReq",
    "ResourceSpec",
    "Sandbox",
    "SandboxConfig",
    "SandboxConnectionError",
    "SandboxDestroyError",
    "SandboxError",
    "SandboxSpawnError",
    "SandboxTimeoutError",
]


class SandboxError(Exception):
    """Base of the errors of this client."""


class SandboxSpawnError(SandboxError):
    """The server refused a spawn, or the sandbox did not start."""


class SandboxDestroyError(SandboxError):
    """The server could not destroy what was named; it may be gone already."""


class SandboxConnectionError(SandboxError, ConnectionError):
    """The server could not be reached, or the connection broke before the answer."""


class SandboxTimeoutError(SandboxError, TimeoutError):
    """The server did not answer within `timeout`. Whether it did what it was asked is unknown."""


@dataclass
class ResourceSpec:
    """Amounts in the notation of Kubernetes; an empty one is the server's choice."""

    cpu: str = ""
    memory: str = ""


@dataclass
class ResourceReq:
    """What a sandbox is to be given at least, and may take at most."""

    requests: ResourceSpec = field(default_factory=ResourceSpec)
    limits: ResourceSpec = field(default_factory=ResourceSpec)


@dataclass
class SandboxConfig:
    """Where the server is and what its sandboxes are made of. Several clients may share one."""

    control_plane_url: str = field(default="", repr=False)
    """The server that spawns. A hive is both this and the gateway. May hold a key: `http://key@host`."""
    gateway_url: str = field(default="", repr=False)
    """The server that speaks MCP, without `/mcp`. May hold a key, too; `ASH_TOKEN` stands in for either."""
    image: str = "timemagic/rl-mcp:general-1.7"
    ports: list[int] = field(default_factory=lambda: [3000])
    env: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    resources: ResourceReq | None = None
    node_selector: dict[str, str] = field(default_factory=dict[str, str])
    timeout: float = 300
    """Seconds that a spawn or a destroy may take, retries included."""
    mcp_timeout: float = 180
    """Seconds that an MCP request may take."""
    runtime_class: str = ""


@dataclass
class Sandbox:
    """A sandbox as the server described it."""

    uuid: str
    name: str
    namespace: str
    status: str
    """`Ready` or `Starting`."""
    host: str = ""
    ports: list[int] = field(default_factory=list[int])
    message: str = ""
    service_type: str = "ClusterIP"
    cluster_ip: str = ""
    _gateway_url: str = field(default="", repr=False)

    @property
    def mcp_url(self) -> str:
        """The gateway's MCP endpoint, to be asked with `X-Session-ID`; with the key that `gateway_url` has."""
        return f"{self._gateway_url.rstrip('/')}{MCP_PATH}" if self._gateway_url else ""

    @property
    def is_ready(self) -> bool:
        return self.status.lower() == "ready"

    @classmethod
    def from_response(cls, data: Mapping[str, Any], gateway_url: str = "") -> Self:
        """Build one from the answer of `POST /spawn`; unknown fields are left out."""
        known = ("uuid", "name", "namespace", "status", "host", "ports", "message", "service_type", "cluster_ip")
        fields: dict[str, Any] = dict.fromkeys(("uuid", "name", "namespace", "status"), "")
        fields |= {name: data[name] for name in known if data.get(name) is not None}
        fields["ports"] = [int(port) for port in fields.get("ports", ())]
        return cls(**fields, _gateway_url=gateway_url)
