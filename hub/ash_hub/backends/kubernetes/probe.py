"""The cluster's support for a hive: the checks of `ash doctor`. Nothing in the cluster is changed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ash_hub.backends.checks import Check
from ash_hub.backends.kubernetes.api import Api, ApiRefusal, Json, open_api
from ash_hub.backends.kubernetes.egress import answers, resolved
from ash_hub.backends.kubernetes.matching import directions, selects, takes
from ash_hub.backends.kubernetes.pods import pod_of
from ash_hub.backends.kubernetes.rights import RIGHTS, Place, Right
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_mcp.errors import AshError, ConfigError
from ash_mcp.types import SandboxSpec, new_sandbox_id

__all__ = ["UNSEEN_NETWORK", "check_cluster", "probe"]

UNSEEN_NETWORK: Final = (
    "sandboxes without a network, or with a list of domains, are ready although it was not seen that nothing else is "
    "open to them: until the network plugin has heard of a pod, all is"
)

_MOST_NODES: Final = 500
_LEVEL: Final = "pod-security.kubernetes.io/enforce"
_LIMITED: Final = ("pods", "cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory")
"""What a quota may limit that a sandbox takes; `count/pods` beside."""
_USER_NAMESPACES: Final = 33
"""The minor version of Kubernetes since which they are on without being asked for."""


async def probe(settings: KubernetesSettings) -> list[Check]:
    """Look at the cluster of these settings and return what was found."""
    try:
        async with open_api(settings.kubeconfig, settings.context) as api:
            return await check_cluster(api, settings)
    except AshError as error:
        fix = "`kubectl auth whoami` with the same kubeconfig must answer"
        return [Check("API server", False, error.message, fix, required=True)]


async def check_cluster(api: Api, settings: KubernetesSettings) -> list[Check]:
    """Look at a cluster whose API is open.

    Raises:
        ConnectFailed: It does not answer, or does not know the account.
    """
    namespace = settings.namespace or api.namespace
    keys = settings.system_namespace or namespace
    version = await _version(api)
    said = version.get("gitVersion") or "an unknown version"
    server = Check("API server", True, f"{said} at {api.address}", required=True)
    checks = [server, await _account(api), _addresses()]
    found = [await _namespace(api, name) for name in dict.fromkeys((namespace, keys))]
    checks += [check for check, _ in found]
    there = all(check.ok for check, _ in found)
    places = {Place.SANDBOXES: namespace, Place.HIVE: keys, Place.CLUSTER: None}
    checks += await _rights(api, places)
    checks.append(_image(settings))
    try:
        pod = pod_of(_trial_spec(settings), settings)
    except ConfigError as error:
        return [*checks, Check("pod", False, error.message, "change these settings", required=True)]
    if there:
        refusal = await _refusal(api, namespace, pod)
        checks += [_pod(refusal), *await _quotas(api, namespace, refusal)]
        checks += [_pod_security(found[0][1], namespace), await _policies(api, namespace, pod)]
    checks += [_canary(settings), await _egress_proxy(settings)]
    checks += [await _runtime_class(api, pod), _user_namespaces(version, pod), *await _nodes(api, pod)]
    return checks


async def _version(api: Api) -> Json:
    try:
        return await api.get("/version") or {}
    except ApiRefusal:
        return {}


async def _account(api: Api) -> Check:
    """Say as whom the cluster knows this hive."""
    path, kind = "/apis/authentication.k8s.io/v1/selfsubjectreviews", "SelfSubjectReview"
    try:
        found = await api.create(path, {"apiVersion": "authentication.k8s.io/v1", "kind": kind})
    except ApiRefusal as refusal:
        return Check("account", True, f"the cluster does not say which ({refusal.message})")
    return Check("account", True, str(found["status"]["userInfo"].get("username")))


def _addresses() -> Check:
    name = "addresses of pods"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return Check(name, True, "this is a pod, which reaches others where NetworkPolicies let it")
    detail = "sandboxes are dialled at them, and from outside of the cluster they are often out of reach"
    return Check(name, False, detail, "run the hive in the cluster (helm/ash), or on one of its nodes")


async def _namespace(api: Api, name: str) -> tuple[Check, Json | None]:
    """Return whether there is a namespace, and itself where this account may see it."""
    title = f"namespace {name}"
    try:
        found = await api.get(f"/api/v1/namespaces/{name}")
    except ApiRefusal:
        return Check(title, True, "this account may not look at the namespace itself", required=True), None
    if found is None:
        fix = f"`kubectl create namespace {name}`, or name another with ASH_HUB_BACKEND__NAMESPACE"
        return Check(title, False, "there is none", fix, required=True), None
    if found["metadata"].get("deletionTimestamp") is not None:
        return Check(title, False, "is being deleted", "wait, and create it again", required=True), found
    return Check(title, True, "is there", required=True), found


async def _rights(api: Api, places: Mapping[Place, str | None]) -> list[Check]:
    """Ask for every right, verb by verb: a review of all rules at once may be incomplete, as it says itself."""
    checks: list[Check] = []
    for right in RIGHTS:
        namespace = places[right.place]
        lacking = [verb for verb in right.verbs if not await _may(api, right, verb, namespace)]
        checks.append(_right(right, lacking, namespace))
    return checks


async def _may(api: Api, right: Right, verb: str, namespace: str | None) -> bool:
    resource, _, subresource = right.resource.partition("/")
    asked = {"group": right.group, "resource": resource, "subresource": subresource, "verb": verb}
    if namespace is not None:
        asked["namespace"] = namespace
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    try:
        found = await api.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
    except ApiRefusal:  # an account that may not even ask
        return False
    return found["status"].get("allowed") is True


def _right(right: Right, lacking: Sequence[str], namespace: str | None) -> Check:
    title = f"right to {right.title or right.resource}"
    where = f"in {namespace}" if namespace is not None else "in the whole cluster"
    if not lacking:
        return Check(title, True, f"{', '.join(right.verbs)} {where}", required=right.required)
    resource = f"{right.resource}.{right.group}" if right.group else right.resource
    option = f" -n {namespace}" if namespace is not None else ""
    kind = "Role" if namespace is not None else "ClusterRole"
    fix = (
        f"bind the account to a {kind} that allows it, as the chart helm/ash does; "
        f"`kubectl auth can-i {lacking[0]} {resource}{option}` must say yes"
    )
    detail = f"not allowed to {', '.join(lacking)} {where}: {right.without}"
    return Check(title, False, detail, fix, required=right.required)


def _image(settings: KubernetesSettings) -> Check:
    if settings.image is not None:
        return Check("image", True, f"{settings.image}, of recipes that name none", required=True)
    fix = "set ASH_HUB_BACKEND__IMAGE to one that holds the runner, built from recipes/Dockerfile"
    return Check("image", False, "none is set: recipes that name none cannot start", fix, required=True)


def _trial_spec(settings: KubernetesSettings) -> SandboxSpec:
    image = None if settings.image is not None else "none"
    return SandboxSpec(id=new_sandbox_id(), recipe="doctor", server={}, image=image)


async def _refusal(api: Api, namespace: str, pod: Json) -> ApiRefusal | None:
    """Have the API server admit the pod of a sandbox without making it, and return why it would not."""
    try:
        await api.create(f"/api/v1/namespaces/{namespace}/pods", pod, dryRun="All")
    except ApiRefusal as refusal:
        return refusal
    return None


def _pod(refusal: ApiRefusal | None) -> Check:
    if refusal is None:
        return Check("pod", True, "the cluster would admit a sandbox's pod (a dry run)", required=True)
    if "does not support dry run" in refusal.message:
        return Check("pod", False, f"cannot be tried: {refusal.message}", "spawn a sandbox to see")
    detail = f"the cluster refuses a sandbox's pod: {refusal.message}"
    if _is_full(refusal):
        return Check("pod", False, detail, "end what runs there, or raise the quota")
    fix = "do what it says; where the pod asks for too much, change it with ASH_HUB_BACKEND__POD_TEMPLATE"
    return Check("pod", False, detail, fix, required=True)


def _is_full(refusal: ApiRefusal | None) -> bool:
    return refusal is not None and "exceeded quota" in refusal.message


async def _quotas(api: Api, namespace: str, refusal: ApiRefusal | None) -> list[Check]:
    found = await _items(api, f"/api/v1/namespaces/{namespace}/resourcequotas")
    if found is None:
        return [Check("quota", True, "this account may not see what there is")]
    parts = [part for quota in found for part in _used(quota)]
    if not parts:
        return [Check("quota", True, "none: sandboxes may fill the cluster up to the limits of the hive")]
    fix = "end what runs there, or raise the quota"
    return [Check("quota", not _is_full(refusal), f"used: {', '.join(parts)}", fix)]


def _used(quota: Json) -> list[str]:
    status: Json = quota.get("status") or {}
    hard: Mapping[str, str] = status.get("hard") or {}
    used: Mapping[str, str] = status.get("used") or {}
    names = [name for name in hard if name.removeprefix("count/") in _LIMITED]
    return [f"{used.get(name, '0')} of {hard[name]} {name}" for name in names]


def _pod_security(namespace: Json | None, name: str) -> Check:
    title = "Pod Security"
    if namespace is None:
        return Check(title, True, "this account may not see the level of the namespace")
    labels: Mapping[str, str] = namespace["metadata"].get("labels") or {}
    level = labels.get(_LEVEL)
    if level in ("restricted", "baseline"):
        return Check(title, True, f"{level} pods only")
    detail = f"{level or 'none'}: who gets hold of the hive's account could make pods that own their node"
    return Check(title, False, detail, f"`kubectl label namespace {name} {_LEVEL}=restricted`")


async def _policies(api: Api, namespace: str, pod: Json) -> Check:
    """Say what NetworkPolicies select a sandbox without a network; of a direction that none selects all is open."""
    title = "network policies"
    found = await _items(api, f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies")
    fix = "the chart helm/ash brings them (networkPolicies.enabled)"
    if found is None:
        return Check(title, False, "this account may not see them; without any, sandboxes are open", fix)
    labels = pod["metadata"]["labels"]
    ours = [policy["spec"] for policy in found if selects(policy["spec"].get("podSelector") or {}, labels)]
    held = {direction for spec in ours for direction in directions(spec)}
    if held == {"Ingress", "Egress"}:
        return Check(title, True, f"{len(ours)} hold sandboxes, if the cluster's network plugin enforces them")
    if not held:
        return Check(title, False, "none: sandboxes are open to each other, and reach every network", fix)
    if "Ingress" in held:
        return Check(title, False, "none of what leaves sandboxes: they reach every network", fix)
    return Check(title, False, "none of what enters sandboxes: they are open to each other", fix)


def _canary(settings: KubernetesSettings) -> Check:
    if settings.canary is not None:
        return Check("canary", True, f"{settings.canary} must refuse before a sandbox is ready, but under internet")
    fix = "set ASH_HUB_BACKEND__CANARY to the hive's own address and port, as the chart helm/ash does"
    return Check("canary", False, f"none is set: {UNSEEN_NETWORK}", fix)


async def _egress_proxy(settings: KubernetesSettings) -> Check:
    title, place = "egress proxy", settings.egress_proxy
    if place is None:
        fix = "set ASH_HUB_BACKEND__EGRESS_PROXY to `host:port` of one, as the chart helm/ash does (egress.enabled)"
        return Check(title, False, "none is named: a network that is a list of domains is refused", fix)
    try:
        address = await resolved(place)
    except OSError as error:
        fix = "deploy it, as the chart helm/ash does (egress.enabled), or correct ASH_HUB_BACKEND__EGRESS_PROXY"
        return Check(
            title, False, f"{place} cannot be found ({error.strerror or error}): spawns with a list fail", fix
        )
    if await answers(address):
        return Check(title, True, f"{place} takes connections; this hive answers it at {settings.egress_listen}")
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return Check(title, True, f"{place}, which is not reached from here, outside of the cluster")
    fix = "`kubectl get pods -l app.kubernetes.io/component=egress` must show some that are ready"
    return Check(title, False, f"{place} does not answer: a list of domains lets nothing out", fix)


async def _runtime_class(api: Api, pod: Json) -> Check:
    title, chosen = "runtime class", pod["spec"].get("runtimeClassName")
    found = await _items(api, "/apis/node.k8s.io/v1/runtimeclasses")
    names = sorted(str(each["metadata"]["name"]) for each in found) if found is not None else None
    there = "which there are this account may not see" if names is None else f"there are: {', '.join(names) or 'none'}"
    if chosen is None:
        fix = "set ASH_HUB_BACKEND__RUNTIME_CLASS" + ("" if names else ", once gVisor or Kata Containers is installed")
        return Check(title, False, f"none is set: sandboxes share the kernel of their node; {there}", fix)
    if names is not None and chosen not in names:
        fix = "set ASH_HUB_BACKEND__RUNTIME_CLASS to one that there is, or install it"
        return Check(title, False, f"the cluster has no {chosen}; {there}", fix, required=True)
    return Check(title, True, f"{chosen}; {there}")


def _user_namespaces(version: Json, pod: Json) -> Check:
    title, ours = "user namespaces", pod["spec"].get("hostUsers") is False
    numbers = [re.match(r"\d+", str(version.get(part))) for part in ("major", "minor")]
    major, minor = (int(number[0]) if number is not None else 0 for number in numbers)
    if major == 0:
        return Check(title, True, "unknown, as the version of the cluster is")
    if (major, minor) < (1, _USER_NAMESPACES):
        detail = f"not on by themselves in Kubernetes {major}.{minor}"
        return Check(title, False, detail, f"use Kubernetes 1.{_USER_NAMESPACES} or later")
    use = "sandboxes have them" if ours else "sandboxes do without (hostUsers of the pod template)"
    return Check(title, True, f"Kubernetes {major}.{minor} has them, on nodes with Linux 6.3 or later; {use}")


async def _nodes(api: Api, pod: Json) -> list[Check]:
    """Return how many nodes could take a sandbox; nothing where this account may not see nodes."""
    spec: Json = pod["spec"]
    selector: Mapping[str, str] = spec.get("nodeSelector") or {}
    wanted = ",".join(f"{label}={value}" for label, value in selector.items())
    nodes = await _items(api, "/api/v1/nodes", limit=str(_MOST_NODES), labelSelector=wanted)
    if nodes is None:
        return []
    takers = [node for node in nodes if takes(node, spec.get("tolerations") or ())]
    many = f"the first {_MOST_NODES}" if len(nodes) == _MOST_NODES else str(len(nodes))
    detail = f"{len(takers)} of {many}{f' with {wanted}' if wanted else ''} could take sandboxes"
    fix = "add nodes, or let sandboxes go to others: ASH_HUB_BACKEND__NODE_SELECTOR, tolerations in the pod template"
    return [Check("nodes", bool(takers), detail, fix)]


async def _items(api: Api, path: str, **query: Any) -> list[Json] | None:
    """Return a collection; None where this account may not see it."""
    try:
        return (await api.get(path, **query) or {}).get("items") or []
    except ApiRefusal:
        return None
