"""Settings of the Kubernetes backend. Quantities as Kubernetes writes them, durations in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ash_hub.egress.limits import Limits as EgressLimits

__all__ = ["KubernetesSettings"]

_NAME = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
_PLACE = r"^[\[\]0-9A-Za-z.:-]+:[0-9]{1,5}$"
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[kKMGTP]i?)?$")]


class KubernetesSettings(BaseModel):
    """Where the pods of a hive live, and what each gets where its spawn says nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["kubernetes"] = "kubernetes"
    hive: Annotated[str, Field(pattern=_NAME)] = "ash"
    """Tells this hive's objects from those of other hives in the same namespace; all its replicas have the same."""
    kubeconfig: Path | None = None
    """None: `KUBECONFIG`, else the account of the pod that the hive runs in, else `~/.kube/config`."""
    context: str | None = None
    """Of the kubeconfig; None: its current one."""
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] | None = None
    """Where sandboxes are made; it must exist. None: that of the kubeconfig's context, or of the hive's own pod."""
    system_namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] | None = None
    """Where the hive keeps its keys, in Secrets. None: beside the sandboxes."""
    image: str | None = None
    """Of sandboxes whose recipe and spawn name none: one that holds the runner (`recipes/Dockerfile`)."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    python: str = "/opt/ash/bin/python"
    """The Python in these images that has the runner."""
    runtime_class: str | None = None
    """Of sandboxes whose spawn names none. None: the cluster's default runtime."""
    node_selector: Mapping[str, str] = {}
    """Of every sandbox; a spawn's own selectors are added."""
    cpu: Quantity = "2"
    memory: Quantity = "2Gi"
    """The limits of a sandbox."""
    cpu_request: Quantity = "100m"
    memory_request: Quantity = "256Mi"
    """What a node must have free for it."""
    workspace: Quantity = "1Gi"
    home: Quantity = "256Mi"
    tmp: Quantity = "512Mi"
    """The most that these places hold; a pod that goes beyond is evicted."""
    listen_host: Literal["0.0.0.0", "::"] = "0.0.0.0"
    """Where runners listen in their pods: `::` where pods have IPv6 addresses only."""
    canary: Annotated[str, Field(pattern=r"^[\[\]0-9A-Fa-f.:]+:[0-9]{1,5}$")] | None = None
    """Address and port of something that always answers, but not to sandboxes of `none` or a list of domains: each of
    them must see it refuse before it is ready, since a pod is open until the network plugin has heard of it. In the
    chart it is the hub that makes the pod. None: sandboxes are ready without that."""
    egress_proxy: Annotated[str, Field(pattern=_PLACE)] | None = None
    """`host:port` at which sandboxes reach the egress proxies (`ash egress`), a Service as a rule; its address is
    looked up for each sandbox. None: a list of domains is refused."""
    egress_listen: Annotated[str, Field(pattern=_PLACE)] = "0.0.0.0:8423"
    """Where this hive tells those proxies what a sandbox may reach; nowhere without `egress_proxy`."""
    internet_by_proxy: bool = False
    """Whether sandboxes of `internet` go out by these proxies, too: HTTP and HTTPS alone then, each request a line in
    their log, and their network can be changed while they run."""
    private_egress: bool = False
    """Whether a list may name an address that is not public, such as a server of the cluster. The NetworkPolicy of the
    proxies must let them reach it."""
    egress: EgressLimits = EgressLimits()
    """The limits of each sandbox at each proxy; `head_bytes` is 32 KiB there, whatever is said."""
    node_lost_seconds: Annotated[int, Field(ge=0)] = 5
    """How long a sandbox stays on a node that does not answer before Kubernetes ends it."""
    pod_template: Mapping[str, Any] = {}
    """Merged over the pod of every sandbox by the rules of `kubectl patch` (strategic): tolerations, affinity,
    volumes, security contexts and the like. The container of the sandbox is named `sandbox`."""

    @model_validator(mode="after")
    def _proxy_named(self) -> Self:
        if self.internet_by_proxy and self.egress_proxy is None:
            raise ValueError("internet_by_proxy needs egress_proxy: where the proxies are")
        return self

    @field_validator("image_pull_secrets", "node_selector", "pod_template", mode="before")
    @classmethod
    def _read_json(cls, given: Any) -> Any:
        """Take a variable of its own in the environment, such as `ASH_HUB_BACKEND__POD_TEMPLATE`, for JSON."""
        try:
            return json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise ValueError(f"must be JSON: {error}") from error
