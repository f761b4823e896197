"""What `ash doctor` finds in clusters that lack something; `tests/kubernetes` asks a real one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ash_hub.backends.checks import Check
from ash_hub.backends.kubernetes.api import Api, ApiRefusal, Json
from ash_hub.backends.kubernetes.probe import check_cluster, probe
from ash_hub.backends.kubernetes.rights import RIGHTS
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from tests.hub.egress.shared_parts import free_port

pytestmark = pytest.mark.anyio

BOXES, HIVE = "/api/v1/namespaces/boxes", "/api/v1/namespaces/hive"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/boxes/networkpolicies"
QUOTAS = f"{BOXES}/resourcequotas"
CLASSES = "/apis/node.k8s.io/v1/runtimeclasses"
NODES = "/api/v1/nodes"
SETTINGS: dict[str, Any] = {
    "hive": "h",
    "namespace": "boxes",
    "system_namespace": "hive",
    "image": "recipes:1",
    "runtime_class": "gvisor",
    "canary": "10.0.0.1:8420",
}
NOWHERE = """\
{"clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
 "users": [{"name": "u", "user": {"token": "t"}}],
 "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
 "current-context": "x"}
"""
FORBIDDEN = ApiRefusal(403, {"reason": "Forbidden", "message": "you may not see it"})


def policy(*types: str, hive: str = "h") -> Json:
    return {"spec": {"podSelector": {"matchLabels": {"ash/hive": hive}}, "policyTypes": list(types)}}


def namespace(level: str | None = "restricted") -> Json:
    return {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": level} if level is not None else {}}}


def node(ready: str = "True") -> Json:
    return {"status": {"conditions": [{"type": "Ready", "status": ready}]}}


def quota(hard: Json, used: Json) -> Json:
    return {"status": {"hard": hard, "used": used}}


class Cluster:
    """A stand-in for the API of a cluster that has all a hive wants, until a test takes it away."""

    address = "https://cluster.test:6443"
    namespace = "home"

    def __init__(self) -> None:
        self.there: dict[str, Json | Exception] = {
            "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
            BOXES: namespace(),
            HIVE: namespace(None),
            POLICIES: {"items": [policy("Ingress", "Egress")]},
            QUOTAS: {"items": []},
            CLASSES: {"items": [{"metadata": {"name": "gvisor"}}, {"metadata": {"name": "kata"}}]},
            NODES: {"items": [node(), node("False")]},
        }
        self.denied: set[tuple[str, str]] = set()
        """Resource and verb of what the account may not do."""
        self.asked: list[Json] = []
        self.pod_refusal: str | None = None
        self.tried: list[Json] = []

    async def get(self, path: str, **query: str) -> Json | None:
        found = self.there.get(path)
        if isinstance(found, Exception):
            raise found
        return found

    async def create(self, path: str, body: Json, **query: str) -> Json:
        if path.endswith("/selfsubjectreviews"):
            return {"status": {"userInfo": {"username": "system:serviceaccount:hive:ash"}}}
        if path.endswith("/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            self.asked.append(asked)
            name = "/".join(part for part in (asked["resource"], asked["subresource"]) if part)
            return {"status": {"allowed": (name, asked["verb"]) not in self.denied}}
        assert path == f"{BOXES}/pods" and query == {"dryRun": "All"}, "nothing may be made"
        self.tried.append(body)
        if self.pod_refusal is not None:
            raise ApiRefusal(403, {"message": self.pod_refusal})
        return body


async def look(cluster: Cluster, **more: Any) -> dict[str, Check]:
    settings = KubernetesSettings.model_validate(SETTINGS | more)
    checks = await check_cluster(cast("Api", cluster), settings)
    assert all(check.ok or check.fix for check in checks)
    return {check.name: check for check in checks}


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be in a pod, and have something that takes connections as an egress proxy does."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setitem(SETTINGS, "egress_proxy", f"127.0.0.1:{proxy.getsockname()[1]}")
        yield


async def test_a_cluster_that_has_all_is_well() -> None:
    found = await look(Cluster())
    assert [check for check in found.values() if not check.ok] == []
    assert found["API server"].detail == "v1.37.0 at https://cluster.test:6443"
    assert found["account"].detail == "system:serviceaccount:hive:ash"
    assert found["nodes"].detail.startswith("1 of 2")
    assert {"namespace boxes", "namespace hive"} <= found.keys()


async def test_a_cluster_on_which_closed_networks_go_unseen_is_said() -> None:
    check = (await look(Cluster(), canary=None))["canary"]
    assert not check.ok and not check.required and "all is" in check.detail


async def test_an_egress_proxy_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await look(Cluster()))["egress proxy"].ok
    away = f"127.0.0.1:{free_port()}"
    check = (await look(Cluster(), egress_proxy=away))["egress proxy"]
    assert not check.ok and not check.required and f"{away} does not answer" in check.detail
    check = (await look(Cluster(), egress_proxy=None))["egress proxy"]
    assert not check.ok and not check.required and "a list of domains is refused" in check.detail
    check = (await look(Cluster(), egress_proxy="nowhere.invalid:3128"))["egress proxy"]
    assert not check.ok and "nowhere.invalid:3128 cannot be found" in check.detail
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    check = (await look(Cluster(), egress_proxy=away))["egress proxy"]
    assert check.ok and "not reached from here" in check.detail


async def test_the_account_is_asked_for_every_right_where_it_is_needed() -> None:
    cluster = Cluster()
    found = await look(cluster)
    asked = {
        (each["group"], each["resource"], each["subresource"], each["verb"], each.get("namespace"))
        for each in cluster.asked
    }
    assert len(asked) == len(cluster.asked) == sum(len(right.verbs) for right in RIGHTS)
    assert {
        ("", "pods", "", "watch", "boxes"),
        ("", "pods", "log", "get", "boxes"),
        ("", "secrets", "", "patch", "hive"),
        ("", "secrets", "", "list", "boxes"),
        ("node.k8s.io", "runtimeclasses", "", "list", None),
    } <= asked
    assert {f"right to {right.title or right.resource}" for right in RIGHTS} <= found.keys()
    assert len({right.title or right.resource for right in RIGHTS}) == len(RIGHTS)


@pytest.mark.parametrize(
    ("resource", "verb", "is_required", "command"),
    [
        ("pods", "patch", True, "kubectl auth can-i patch pods -n boxes"),
        ("pods/log", "get", False, "kubectl auth can-i get pods/log -n boxes"),
        ("events", "watch", False, "kubectl auth can-i watch events -n boxes"),
        ("configmaps", "create", True, "kubectl auth can-i create configmaps -n boxes"),
        ("secrets", "get", True, "kubectl auth can-i get secrets -n hive"),  # in the other namespace it is not needed
        ("runtimeclasses", "list", False, "kubectl auth can-i list runtimeclasses.node.k8s.io`"),
    ],
)
async def test_a_verb_that_is_not_allowed_is_named(resource: str, verb: str, is_required: bool, command: str) -> None:
    cluster = Cluster()
    cluster.denied = {(resource, verb)}
    bad = [check for check in (await look(cluster)).values() if not check.ok]
    assert [check.name for check in bad] == [f"right to {resource}"]
    assert f"not allowed to {verb} in " in bad[0].detail
    assert bad[0].required is is_required and command in (bad[0].fix or "")


FULL = quota({"pods": "3", "count/services": "0", "limits.memory": "9Gi"}, {"pods": "3", "limits.memory": "6Gi"})
LACKS: dict[str, tuple[dict[str, Json | Exception | None], str, bool, str, str]] = {
    "no namespace": ({BOXES: None}, "namespace boxes", True, "there is none", "kubectl create namespace boxes"),
    "no namespace for keys": ({HIVE: None}, "namespace hive", True, "there is none", "kubectl create namespace hive"),
    "a namespace that ends": (
        {BOXES: {"metadata": {"deletionTimestamp": "now"}}},
        "namespace boxes",
        True,
        "being deleted",
        "create it again",
    ),
    "no policies": ({POLICIES: {"items": []}}, "network policies", False, "open to each other", "helm/ash"),
    "policies of others": (
        {POLICIES: {"items": [policy("Ingress", "Egress", hive="other")]}},
        "network policies",
        False,
        "open to each other",
        "helm/ash",
    ),
    "no policy for what leaves": (
        {POLICIES: {"items": [policy("Ingress")]}},
        "network policies",
        False,
        "they reach every network",
        "helm/ash",
    ),
    "no policy for what enters": (
        {POLICIES: {"items": [policy("Egress")]}},
        "network policies",
        False,
        "none of what enters",
        "helm/ash",
    ),
    "policies unseen": ({POLICIES: FORBIDDEN}, "network policies", False, "may not see", "helm/ash"),
    "no level": ({BOXES: namespace(None)}, "Pod Security", False, "none: ", "enforce=restricted"),
    "a low level": ({BOXES: namespace("privileged")}, "Pod Security", False, "privileged: ", "enforce=restricted"),
    "no such class": (
        {CLASSES: {"items": [{"metadata": {"name": "kata"}}]}},
        "runtime class",
        True,
        "no gvisor; there are: kata",
        "ASH_HUB_BACKEND__RUNTIME_CLASS",
    ),
    "an old cluster": (
        {"/version": {"major": "1", "minor": "32+", "gitVersion": "v1.32.1"}},
        "user namespaces",
        False,
        "Kubernetes 1.32",
        "1.33",
    ),
    "no node": ({NODES: {"items": [node("False")]}}, "nodes", False, "0 of 1 could", "add nodes"),
}


@pytest.mark.parametrize(("change", "name", "is_required", "says", "advice"), LACKS.values(), ids=list(LACKS))
async def test_what_a_cluster_lacks_is_said_with_what_to_do(
    change: dict[str, Json | Exception | None], name: str, is_required: bool, says: str, advice: str
) -> None:
    cluster = Cluster()
    for path, found in change.items():
        cluster.there.pop(path)
        if found is not None:
            cluster.there[path] = found
    bad = [check for check in (await look(cluster)).values() if not check.ok]
    assert [check.name for check in bad] == [name]
    assert says in bad[0].detail and advice in (bad[0].fix or "") and bad[0].required is is_required


async def test_what_the_account_may_not_see_is_no_fault_of_the_cluster() -> None:
    cluster = Cluster()
    cluster.there |= dict.fromkeys(["/version", BOXES, HIVE, QUOTAS, CLASSES, NODES], FORBIDDEN)
    found = await look(cluster)
    assert [check for check in found.values() if not check.ok] == []
    assert "nodes" not in found and "may not see" in found["quota"].detail


@pytest.mark.parametrize(
    ("change", "name", "says", "advice"),
    [
        ({"image": None}, "image", "none is set", "ASH_HUB_BACKEND__IMAGE"),
        ({"pod_template": {"spec": {"containers": [{"image": "x"}]}}}, "pod", "name", "change these settings"),
    ],
    ids=["no image", "a template that is none"],
)
async def test_settings_that_make_no_pod_are_said(change: dict[str, Any], name: str, says: str, advice: str) -> None:
    bad = [check for check in (await look(Cluster(), **change)).values() if not check.ok]
    assert [check.name for check in bad] == [name]
    assert bad[0].required and says in bad[0].detail and advice in (bad[0].fix or "")


async def test_no_runtime_class_is_a_limit_that_names_those_there_are() -> None:
    check = (await look(Cluster(), runtime_class=None))["runtime class"]
    assert not check.ok and not check.required and "there are: gvisor, kata" in check.detail


async def test_a_pod_that_the_cluster_would_refuse_is_found_without_making_one() -> None:
    cluster = Cluster()
    cluster.pod_refusal = 'violates PodSecurity "restricted:latest"'
    check = (await look(cluster))["pod"]
    assert cluster.tried[0]["spec"]["runtimeClassName"] == "gvisor"
    assert not check.ok and check.required and "violates PodSecurity" in check.detail


async def test_a_full_quota_limits_for_now_and_says_how_much_is_used() -> None:
    cluster = Cluster()
    cluster.there[QUOTAS] = {"items": [FULL]}
    cluster.pod_refusal = "exceeded quota: q, requested: pods=1"
    found = await look(cluster)
    assert found["quota"].detail == "used: 3 of 3 pods, 6Gi of 9Gi limits.memory"
    assert not found["quota"].ok and not found["pod"].ok and not found["pod"].required


async def test_from_outside_it_is_said_that_pods_may_be_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    check = (await look(Cluster()))["addresses of pods"]
    assert not check.ok and not check.required and "helm/ash" in (check.fix or "")


@pytest.mark.parametrize(
    ("kubeconfig", "says"), [("", "cannot be found"), (NOWHERE, "does not answer")], ids=["none", "of no server"]
)
async def test_a_cluster_that_cannot_be_asked_is_said(kubeconfig: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(kubeconfig)
    [check] = await probe(KubernetesSettings(kubeconfig=tmp_path / "config"))
    assert not check.ok and check.required and says in check.detail and "kubectl auth whoami" in (check.fix or "")
