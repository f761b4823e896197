"""The pod of a sandbox: its manifest from a spec, and what a pod's status says of its sandbox. Pure."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple, cast

from ash_hub.backends.amounts import LEAST_MEMORY
from ash_hub.backends.base import Exit, Instance, Phase
from ash_hub.backends.kubernetes.api import Json
from ash_hub.backends.kubernetes.image_server import (
    SERVER,
    endpoint_of,
    literal,
    server_annotation,
    server_container,
    server_of,
)
from ash_hub.backends.kubernetes.merge import merged
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.backends.network import require_network
from ash_hub.backends.runner import RUNNER_ARGUMENTS, RUNNER_MODULE, runner_config, runner_environment
from ash_mcp.errors import ConfigError
from ash_mcp.quantities import cpu_quantity, memory_quantity
from ash_mcp.types import Cause, Endpoint, SandboxId, SandboxSpec

__all__ = [
    "CONTAINER",
    "HIVE_LABEL",
    "PORT",
    "WayOut",
    "goes_by_proxy",
    "instance_of",
    "is_pod_of",
    "network_label",
    "pod_of",
    "policy_of",
    "record_patch",
    "sandbox_labels",
    "selector",
]

CONTAINER: Final = "sandbox"
PORT: Final = 8421
_USER: Final = 10001
_WORKSPACE: Final = "/workspace"
_HOME: Final = "/home/ash"
HIVE_LABEL: Final = "ash/hive"
_SANDBOX: Final = "ash/sandbox"
_NETWORK: Final = "ash/network"
_DOMAINS: Final = "domains"
"""The label of pods that go out by an egress proxy. It stays when their policy changes, which the proxy holds to."""
_POLICY: Final = "ash/policy"
_RECORD: Final = "ash/record"
_REVISION: Final = "ash/revision"
_LABELS: Final = "ash/labels"
_LOST: Final = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

_FATAL: Final[Mapping[str, str]] = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled",
    "ErrImageNeverPull": "its image is not on the node, and may not be pulled",
    "InvalidImageName": "its image has no valid name",
    "ImageInspectError": "its image cannot be read",
    "CreateContainerConfigError": "its container cannot be configured",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its container cannot be run",
}
"""Why a container waits that will not come to run by waiting."""

_NOT_RUN: Final = ("StartError", "ContainerCannotRun")
"""How a container has ended whose program could not even be started."""

_DISRUPTIONS: Final[Mapping[str, tuple[str, Cause]]] = {
    "PreemptionByScheduler": ("preempted by a pod of higher priority", Cause.HOST),
    "EvictionByEvictionAPI": ("evicted, as when its node is drained", Cause.OPERATOR),
    "DeletionByTaintManager": (
        "deleted because its node does not answer or has a taint that it does not tolerate",
        Cause.HOST,
    ),
    "DeletionByPodGC": ("deleted because its node is gone", Cause.HOST),
    "TerminationByKubelet": ("ended by its node", Cause.HOST),
}


def selector(hive: str) -> str:
    """Return the label selector of all that one hive makes for its sandboxes."""
    return f"{HIVE_LABEL}={hive},{_SANDBOX}"


def sandbox_labels(hive: str, sandbox_id: SandboxId) -> dict[str, str]:
    """Return the labels of all that a hive makes for one sandbox."""
    return {"app.kubernetes.io/managed-by": "ash", HIVE_LABEL: hive, _SANDBOX: sandbox_id}


def is_pod_of(pod: Json, hive: str) -> bool:
    """Whether a hive made a pod; not so a copy under another name, whose labels still name the original."""
    metadata: Json = pod["metadata"]
    labels: Json = metadata.get("labels") or {}
    return labels.get(HIVE_LABEL) == hive and labels.get(_SANDBOX) == metadata["name"]


class WayOut(NamedTuple):
    """How a sandbox reaches its egress proxy."""

    address: str
    """`host:port`, no name."""
    token: str
    """What proves the sandbox to it."""


def goes_by_proxy(network: str | tuple[str, ...], settings: KubernetesSettings) -> bool:
    """Whether a sandbox that starts with this policy goes out by an egress proxy."""
    return not isinstance(network, str) or (network == "internet" and settings.internet_by_proxy)


def network_label(network: str | tuple[str, ...], settings: KubernetesSettings) -> str:
    """Return what the NetworkPolicies of the chart know a policy by.

    Raises:
        ConfigError: It cannot be read, or cannot be carried out on a cluster.
    """
    require_network(network, private=settings.private_egress)
    if isinstance(network, str):
        return _DOMAINS if goes_by_proxy(network, settings) else network
    if settings.egress_proxy is None:
        raise ConfigError(
            "network: this hive has no egress proxy, so sandboxes have none or internet; for lists of domains its "
            "operator sets ASH_HUB_BACKEND__EGRESS_PROXY (egress.enabled of the chart)"
        )
    return _DOMAINS


def policy_of(pod: Json, settings: KubernetesSettings) -> Json | None:
    """Return what an egress proxy is told of a pod; None of one that does not go out by it, or has ended."""
    metadata: Json = pod["metadata"]
    status: Json = pod.get("status") or {}
    labels: Json = metadata.get("labels") or {}
    annotations: Json = metadata.get("annotations") or {}
    is_theirs = labels.get(_NETWORK) == _DOMAINS and _POLICY in annotations
    if not is_theirs or _phase(pod, status, None)[0] is Phase.ENDED:
        return None
    addresses = [str(each["ip"]) for each in status.get("podIPs") or ()]
    return {"policy": json.loads(annotations[_POLICY]), "limits": asdict(settings.egress), "addresses": addresses}


def pod_of(spec: SandboxSpec, settings: KubernetesSettings, way_out: WayOut | None = None) -> Json:
    """Return the manifest of a sandbox's pod.

    Args:
        way_out: Of one that `goes_by_proxy`.

    Raises:
        ConfigError: The spec, or the template over it, asks for what no pod can be; nothing is made.
    """
    server = server_of(spec)
    image = spec.image or (settings.image if server is None else None)
    if image is None and server is not None:
        raise ConfigError(
            f"recipe {spec.recipe} is an image that serves MCP by itself, but names none: give it its `image`, or "
            "name one in the spawn"
        )
    if image is None:
        raise ConfigError(
            f"recipe {spec.recipe} names no image: give it one, or set ASH_HUB_BACKEND__IMAGE for all that name none"
        )
    if spec.mounts:
        raise ConfigError(
            f"recipe {spec.recipe} is a folder of the hive's own machine, which pods cannot see: put it into an image"
        )
    label = network_label(spec.network, settings)
    if server is not None and label == _DOMAINS:
        if spec.network != "internet":
            raise ConfigError(
                f"network: recipe {spec.recipe} is an image that serves MCP by itself, and only a runner passes on to "
                "an egress proxy: say none or internet"
            )
        label = "internet"
    policy = {_POLICY: json.dumps(spec.network)} if label == _DOMAINS else {}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": spec.id,
            "labels": sandbox_labels(settings.hive, spec.id) | {_NETWORK: label},
            "annotations": {
                _RECORD: _json(spec.record),
                _REVISION: "0",
                _LABELS: _json(spec.labels),
                **({} if server is None else {SERVER: server_annotation(server)}),
                **policy,
            },
        },
        "spec": _pod_spec(spec, settings, image, way_out),
    }
    return cast("Json", merged(pod, settings.pod_template))


def _pod_spec(spec: SandboxSpec, settings: KubernetesSettings, image: str, way_out: WayOut | None) -> Json:
    server = server_of(spec)
    sizes = {"workspace": settings.workspace, "home": settings.home, "tmp": settings.tmp}
    places = {"workspace": _WORKSPACE, "home": _HOME, "tmp": "/tmp"}
    own_port = PORT if server is None else server["port"]
    if server is not None:  # its own program may be in a folder of that name
        del sizes["workspace"], places["workspace"]
    runtime_class = spec.runtime_class or settings.runtime_class
    node_selector = {**settings.node_selector, **spec.node_selector}
    secrets = [{"name": name} for name in settings.image_pull_secrets]
    optional: Json = {
        "runtimeClassName": runtime_class,
        "nodeSelector": node_selector or None,
        "imagePullSecrets": secrets or None,
    }
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [
            {
                "key": key,
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": settings.node_lost_seconds,
            }
            for key in _LOST
        ],
        "containers": [
            {
                "name": CONTAINER,
                "image": image,
                "imagePullPolicy": settings.image_pull_policy,
                **(_runner(spec, settings, way_out) if server is None else server_container(spec, server, home=_HOME)),
                "ports": [{"containerPort": port} for port in dict.fromkeys((own_port, *spec.ports))],
                "resources": _resources(spec, settings),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": name, "mountPath": path} for name, path in places.items()],
            }
        ],
        "volumes": [{"name": name, "emptyDir": {"sizeLimit": size}} for name, size in sizes.items()],
    } | {name: value for name, value in optional.items() if value is not None}


def _runner(spec: SandboxSpec, settings: KubernetesSettings, way_out: WayOut | None) -> Json:
    """Return what a container of ours runs."""
    command = [settings.python, *RUNNER_ARGUMENTS]
    return {"command": command, "workingDir": _WORKSPACE, "env": _environment(spec, settings, way_out)}


def _environment(spec: SandboxSpec, settings: KubernetesSettings, way_out: WayOut | None) -> list[Json]:
    host = f"[{settings.listen_host}]" if ":" in settings.listen_host else settings.listen_host
    canary = settings.canary if spec.network != "internet" or way_out is not None else None
    egress = way_out.address if way_out is not None else None
    config = runner_config(spec, workspace=_WORKSPACE, home=_HOME, egress=egress, canary=canary)
    variables = runner_environment(config, listen=f"{host}:{PORT}") | {
        "ASH_SANDBOX_KEY": spec.key,
        "TMPDIR": "/tmp",
    }
    if way_out is not None:
        variables["ASH_EGRESS_TOKEN"] = way_out.token
    return [{"name": name, "value": literal(value)} for name, value in variables.items()]


def _resources(spec: SandboxSpec, settings: KubernetesSettings) -> Json:
    limits, requests = spec.resources.limits, spec.resources.requests
    cpu, memory = limits.cpu or settings.cpu, limits.memory or settings.memory
    least_cpu, least_memory = requests.cpu or settings.cpu_request, requests.memory or settings.memory_request
    if memory_quantity(memory) < LEAST_MEMORY:
        raise ConfigError(
            f"a memory limit of {memory} is too small, since the sandbox's own server takes most of that: "
            f"give at least {LEAST_MEMORY // 2**20}Mi"
        )
    # What a spawn asks for explicitly must fit; the hive's own default request gives way to a smaller limit.
    if cpu_quantity(least_cpu) > cpu_quantity(cpu):
        if requests.cpu is not None:
            raise ConfigError(f"a cpu request of {least_cpu} is over its limit of {cpu}")
        least_cpu = cpu
    if memory_quantity(least_memory) > memory_quantity(memory):
        if requests.memory is not None:
            raise ConfigError(f"a memory request of {least_memory} is over its limit of {memory}")
        least_memory = memory
    return {
        "requests": {"cpu": least_cpu, "memory": least_memory},
        "limits": {"cpu": cpu, "memory": memory},
    }


def record_patch(
    record: Mapping[str, Any], revision: int, *, network: str | tuple[str, ...] | None = None
) -> list[Json]:
    """Return the JSON Patch that replaces a record of that revision, and what the egress proxies are told with it."""
    operations: list[Json] = [
        {"op": "test", "path": _annotation(_REVISION), "value": str(revision)},
        {"op": "replace", "path": _annotation(_RECORD), "value": _json(record)},
        {"op": "replace", "path": _annotation(_REVISION), "value": str(revision + 1)},
    ]
    if network is not None:
        operations.append({"op": "replace", "path": _annotation(_POLICY), "value": json.dumps(network)})
    return operations


def _annotation(name: str) -> str:
    return f"/metadata/annotations/{name.replace('/', '~1')}"


def instance_of(pod: Json, waits_for: str | None = None, eviction: str | None = None) -> Instance:
    """Return the sandbox that a pod is.

    Args:
        waits_for: What the cluster's events say of a pod that does not run yet.
        eviction: Why its node evicted it, as they say: the status of a pod that ends with 0 when it is told to, as
            runners do, often does not.
    """
    metadata: Json = pod["metadata"]
    annotations: Json = metadata.get("annotations") or {}
    status: Json = pod.get("status") or {}
    phase, how = _phase(pod, status, eviction)
    address, is_running = str(status.get("podIP")), phase is Phase.RUNNING
    where = endpoint_of(address, annotations.get(SERVER)) or Endpoint(host=address, port=PORT)
    return Instance(
        id=SandboxId(str(metadata["name"])),
        phase=phase,
        endpoint=where if is_running else None,
        exit=how,
        waits_for=_waits_for(status) or waits_for if phase is Phase.STARTING else None,
        labels={str(key): str(value) for key, value in _object(annotations.get(_LABELS)).items()},
        record=_object(annotations.get(_RECORD)),
        revision=_number(annotations.get(_REVISION)),
    )


def _phase(pod: Json, status: Json, eviction: str | None) -> tuple[Phase, Exit | None]:
    """Return the phase, and in `ENDED` how it ended."""
    metadata: Json = pod["metadata"]
    state = _container_state(status)
    terminated: Json | None = state.get("terminated")
    disruption = _disruption(status, eviction)
    if terminated is not None:
        return Phase.ENDED, disruption or _exit(pod, terminated)
    if status.get("phase") in ("Failed", "Succeeded"):
        why = str(status.get("message") or status.get("reason") or "its pod ended")
        return Phase.ENDED, disruption or Exit(why, Cause.HOST)
    if metadata.get("deletionTimestamp") is not None:
        return Phase.ENDED, disruption or Exit("its pod is being deleted", Cause.OPERATOR)
    waiting: Json = state.get("waiting") or {}
    if (why := _FATAL.get(str(waiting.get("reason")))) is not None:
        said = str(waiting.get("message") or waiting["reason"])
        return Phase.ENDED, Exit(f"{why}: {said}{_lack_of_runner(pod, said)}", Cause.HIVE)
    if "running" in state and status.get("podIP"):
        return Phase.RUNNING, None
    return Phase.STARTING, None


def _container_state(status: Json) -> Json:
    for container in status.get("containerStatuses") or ():
        if container["name"] == CONTAINER:
            return container.get("state") or {}
    return {}


def _lack_of_runner(pod: Json, said: str) -> str:
    """Return what to do where a runtime says that there is no such program as the runner's."""
    made: Json = pod.get("spec") or {}
    containers: list[Json] = made.get("containers") or []
    command: Any = next((each.get("command") for each in containers if each.get("name") == CONTAINER), None)
    if not command or RUNNER_MODULE not in command or command[0] not in said:
        return ""
    return (
        ". The image does not hold the runner: build it on recipes/Dockerfile, or, where it is an MCP server by "
        "itself, give it a recipe that says so ([server.image])"
    )


def _exit(pod: Json, terminated: Json) -> Exit:
    if terminated.get("reason") in _NOT_RUN:
        said = str(terminated.get("message") or "").strip()
        return Exit(f"its container cannot be run: {said[:1000]}{_lack_of_runner(pod, said)}", Cause.HIVE)
    if terminated.get("reason") == "OOMKilled":
        return Exit("killed: out of memory", Cause.LIMIT)
    code = int(terminated.get("exitCode", 0))
    number = int(terminated.get("signal") or 0) or (code - 128 if 128 < code < 128 + signal.NSIG else 0)
    if number in signal.valid_signals():
        return Exit(f"killed by {signal.Signals(number).name}", Cause.AGENT)
    said = str(terminated.get("message") or "").strip()
    return Exit(f"exited with code {code}" + (f": {said[:500]}" if said else ""), Cause.AGENT)


def _disruption(status: Json, eviction: str | None) -> Exit | None:
    """Return who ended a pod from outside, as its conditions say."""
    if status.get("reason") == "Evicted":
        eviction = status.get("message") or eviction or "the node ran out of something"
    if eviction is not None:
        # the kubelet's words for a pod that is over a limit of its own; of others it says that the node runs low
        cause = Cause.LIMIT if "exceed" in eviction else Cause.HOST
        return Exit(f"evicted by its node: {eviction.strip()}", cause)
    condition = _condition(status, "DisruptionTarget")
    if condition is None or condition.get("status") != "True":
        return None
    reason = str(condition.get("reason"))
    why, cause = _DISRUPTIONS.get(reason, (reason, Cause.HOST))
    return Exit(f"{why}: {condition['message']}" if condition.get("message") else why, cause)


def _waits_for(status: Json) -> str | None:
    scheduled = _condition(status, "PodScheduled")
    if scheduled is not None and scheduled.get("status") == "False":
        return f"no node takes it: {scheduled.get('message') or scheduled.get('reason')}"
    return None


def _condition(status: Json, kind: str) -> Json | None:
    return next((each for each in status.get("conditions") or () if each.get("type") == kind), None)


def _json(shape: Mapping[str, Any]) -> str:
    return json.dumps(shape, separators=(",", ":"))


def _object(text: object) -> Json:
    """Return an annotation's JSON object; nothing where somebody has put something else there."""
    try:
        found = json.loads(str(text))
    except ValueError:
        return {}
    return cast("Json", found) if isinstance(found, dict) else {}


def _number(text: object) -> int:
    try:
        return int(str(text))
    except ValueError:
        return 0
