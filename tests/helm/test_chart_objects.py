"""What the chart makes: confined pods, accounts with exactly their verbs, Services by the names that are known."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from ash_hub.backends.kept_keys import keep_egress_key
from ash_hub.backends.kubernetes.api import Api
from ash_hub.backends.kubernetes.documents import KubernetesDocuments
from ash_hub.egress.starting import standing_command
from ash_hub.spawning.recipes import Catalog
from tests.helm.chart import (
    CHART,
    EVERYTHING,
    KUBERNETES,
    NAMESPACE,
    NOTHING,
    TABLE,
    environment,
    helm,
    names,
    one,
    pod_specs,
    template,
)
from tests.hub.backends.kubernetes.api_parts import StandInApi


@pytest.mark.parametrize("values", TABLE.values(), ids=TABLE.keys())
def test_the_chart_passes_the_linter(values: dict[str, Any]) -> None:
    done = helm("lint", "--strict", str(CHART), "--namespace", NAMESPACE, "--kube-version", KUBERNETES, values=values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", TABLE.values(), ids=TABLE.keys())
def test_every_container_is_confined(values: dict[str, Any]) -> None:
    specs = list(pod_specs(template(values)))
    assert specs
    for name, spec in specs:
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] == 10001, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert {"requests", "limits"} <= container["resources"].keys(), name


@pytest.mark.parametrize("values", TABLE.values(), ids=TABLE.keys())
def test_no_two_objects_have_one_name(values: dict[str, Any]) -> None:
    found = [
        (it["kind"], it["metadata"].get("namespace", NAMESPACE), it["metadata"]["name"]) for it in template(values)
    ]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("values", TABLE.values(), ids=TABLE.keys())
def test_every_selector_finds_the_pods_that_it_means(values: dict[str, Any]) -> None:
    objects = template(values)
    pods = {
        it["metadata"]["name"]: it["spec"]["template"]["metadata"]["labels"]
        for it in objects
        if it["kind"] in ("Deployment", "StatefulSet")
    }
    for it in objects:
        match it["kind"]:
            case "Service":
                selector = it["spec"]["selector"]
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget":
                selector = it["spec"]["selector"]["matchLabels"]
            case _:
                continue
        found = {name for name, labels in pods.items() if selector.items() <= labels.items()}
        gateway = "ash-router" if "ash-router" in pods else "ash-hub"
        means = {"ash": "ash-hub", "control-plane": "ash-hub", "gateway": gateway, "ash-policies": "ash-hub"}
        assert found == {means.get(it["metadata"]["name"], it["metadata"]["name"])}, it["metadata"]["name"]


def test_the_seeds_names_are_services_on_port_80() -> None:
    objects = template()
    assert names(objects, "Service") == {
        *("ash", "control-plane", "gateway", "ash-redis"),
        *("ash-egress", "ash-policies"),
    }
    ports = {name: one(objects, "Service", name)["spec"]["ports"] for name in ("ash", "control-plane", "gateway")}
    assert set(map(str, ports.values())) == {"[{'name': 'http', 'port': 80, 'targetPort': 'http'}]"}
    (container,) = one(objects, "Deployment", "ash-hub")["spec"]["template"]["spec"]["containers"]
    assert {"name": "http", "containerPort": 8420} in container["ports"]


def test_names_follow_the_release() -> None:
    assert {"x-ash", "x-ash-redis"} < names(template(release="x"), "Service")
    objects = template(release="x" * 53)
    for it in objects:
        assert len(it["metadata"]["name"]) <= 63 or it["kind"] not in ("Service", "Namespace", "Job", "Deployment")


def test_the_hub_writes_only_where_it_has_a_bounded_volume() -> None:
    spec = one(template(), "Deployment", "ash-hub")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    mounts = {it["name"]: it["mountPath"] for it in container["volumeMounts"]}
    assert mounts == {"state": "/var/lib/ash", "run": "/run/ash", "tmp": "/tmp"}
    assert all("sizeLimit" in it["emptyDir"] for it in spec["volumes"])
    variables = environment(template())
    assert variables["ASH_HUB_STATE_DIR"].startswith("/var/lib/ash/")
    assert variables["ASH_HUB_RUN_DIR"].startswith("/run/ash/")


def test_hubs_are_reached_by_each_other_where_there_is_a_redis() -> None:
    variables = environment(template())
    assert variables["ASH_HUB_REDIS_URL"] == "redis://ash-redis:6379/0"
    assert variables["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert variables["ASH_HUB_ADVERTISE"] == "$(POD_IP):8422"
    alone = environment(template(NOTHING))
    assert not {"ASH_HUB_REDIS_URL", "ASH_HUB_ADVERTISE"} & alone.keys()


def test_calls_may_take_of_a_pods_grace_what_its_end_does_not_need() -> None:
    given = {"hub": {"terminationGracePeriodSeconds": 300}, "router": {"enabled": True}}
    objects = template(given)
    assert environment(objects)["ASH_HUB_DRAIN_SECONDS"] == "290"
    assert environment(objects, "ash-router")["ASH_HUB_DRAIN_SECONDS"] == "80"


def test_a_hub_is_what_must_refuse_its_sandboxes_where_there_are_policies() -> None:
    assert environment(template())["ASH_HUB_BACKEND__CANARY"] == "$(POD_IP):8420"
    assert "ASH_HUB_BACKEND__CANARY" not in environment(template({"networkPolicies": {"enabled": False}}))


def test_the_url_of_another_redis_comes_from_a_secret() -> None:
    objects = template(TABLE["redis by url"])
    assert environment(objects)["ASH_HUB_REDIS_URL"] == {"secretKeyRef": {"name": "ash-redis-url", "key": "url"}}
    assert one(objects, "Secret", "ash-redis-url")["stringData"]["url"] == "redis://user:secret@redis.example:6379/1"
    named = environment(template(TABLE["redis by secret"]))
    assert named["ASH_HUB_REDIS_URL"] == {"secretKeyRef": {"name": "redis-url", "key": "url"}}


def test_the_redis_of_the_chart_never_evicts_and_keeps_what_it_has() -> None:
    objects = template(EVERYTHING)
    it = one(objects, "StatefulSet", "ash-redis")["spec"]
    arguments = it["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--maxmemory-policy") + 1] == "noeviction"
    assert arguments[arguments.index("--appendonly") + 1] == "yes"
    assert it["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "fast"
    emptied = one(template(TABLE["redis in memory"]), "StatefulSet", "ash-redis")["spec"]
    assert "volumeClaimTemplates" not in emptied
    assert "emptyDir" in emptied["template"]["spec"]["volumes"][0]


def rules(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def granted(group: str, resource: str, verbs: str) -> set[tuple[str, str, str]]:
    return {(group, resource, verb) for verb in verbs.split()}


def test_the_hub_may_do_exactly_what_it_does() -> None:
    objects = template(EVERYTHING)
    sandboxes = one(objects, "Role", "ash-sandboxes")
    assert sandboxes["metadata"]["namespace"] == "ash-sandboxes"
    assert rules(sandboxes) == (
        granted("", "pods", "get list watch create patch delete")
        | granted("", "pods/log", "get")
        | granted("", "events", "list watch")
        | granted("", "configmaps", "get list create patch delete")
        | granted("", "secrets", "list create patch delete")
    )
    keys = one(objects, "Role", "ash-keys")
    assert "namespace" not in keys["metadata"]  # the release's
    assert rules(keys) == granted("", "secrets", "get list watch create patch delete")
    assert rules(one(objects, "ClusterRole", f"{NAMESPACE}-ash-runtime-classes")) == granted(
        "node.k8s.io", "runtimeclasses", "get list"
    )


def test_every_account_has_its_own_roles_and_no_other() -> None:
    held = {
        (it["subjects"][0]["name"], it["roleRef"]["kind"], it["roleRef"]["name"], it["metadata"].get("namespace"))
        for it in template(EVERYTHING)
        if it["kind"].endswith("RoleBinding")
    }
    assert held == {
        ("ash-hub", "Role", "ash-sandboxes", "ash-sandboxes"),
        ("ash-hub", "Role", "ash-keys", None),
        ("ash-hub", "ClusterRole", f"{NAMESPACE}-ash-runtime-classes", None),
        ("ash-router", "Role", "ash-router", None),
        ("ash-uninstall", "Role", "ash-uninstall", None),
        ("ash-uninstall", "Role", "ash-uninstall-sandboxes", "ash-sandboxes"),
    }


def test_a_router_may_read_keys_and_the_uninstall_may_only_end() -> None:
    objects = template(EVERYTHING)
    assert rules(one(objects, "Role", "ash-router")) == granted("", "secrets", "get list watch")
    uninstall = one(objects, "Role", "ash-uninstall")
    assert rules(uninstall) == granted("apps", "deployments/scale", "patch") | granted("", "pods", "list")
    assert uninstall["rules"][0]["resourceNames"] == ["ash-hub"]
    assert rules(one(objects, "Role", "ash-uninstall-sandboxes")) == granted("", "pods", "list delete")


def test_sandboxes_redis_and_egress_proxies_have_no_account_of_the_chart() -> None:
    accounts = {name: spec.get("automountServiceAccountToken") for name, spec in pod_specs(template(EVERYTHING))}
    assert {accounts[name] for name in ("ash-redis", "ash-test-spawn", "ash-egress")} == {False}


def test_an_egress_proxy_is_told_where_the_hubs_are_and_has_the_key_that_they_make() -> None:
    objects = template({"sandboxes": {"hive": "mine"}})
    config = json.loads(one(objects, "ConfigMap", "ash-egress")["data"]["egress.json"])
    spec = one(objects, "Deployment", "ash-egress")["spec"]["template"]["spec"]
    assert config["hive"] == f"ash-policies.{NAMESPACE}.svc.cluster.local:8423"
    assert 0 < config["drain_seconds"] < spec["terminationGracePeriodSeconds"] - 5  # which it waits before it is told
    ports = {it["name"]: it["containerPort"] for it in spec["containers"][0]["ports"]}
    assert [config["listen"], config["health"]] == [f"0.0.0.0:{ports['proxy']}", f"0.0.0.0:{ports['health']}"]
    (key,) = [it["secret"]["secretName"] for it in spec["volumes"] if it["name"] == "key"]
    made = StandInApi()
    documents = KubernetesDocuments(cast("Api", made), hive="mine", namespace="n", key_namespace=NAMESPACE)
    anyio.run(keep_egress_key, documents)
    assert list(made.objects) == [f"/api/v1/namespaces/{NAMESPACE}/secrets/{key}"]
    assert not names(template({"egress": {"enabled": False}}), "Deployment") & {"ash-egress"}


def test_an_egress_proxy_starts_by_the_configuration_that_the_chart_gives_it(tmp_path: Path) -> None:
    """All of it is read before the key is missed, which no hub has made here."""
    text = one(template(), "ConfigMap", "ash-egress")["data"]["egress.json"]
    (tmp_path / "egress.json").write_text(text)
    done = subprocess.run(standing_command(tmp_path / "egress.json"), capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "/etc/ash/key/body" in done.stderr


def test_the_namespace_of_sandboxes_enforces_restricted_pod_security() -> None:
    labels = one(template(), "Namespace", "ash-sandboxes")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert not names(template(NOTHING), "Namespace")


def test_quota_and_limits_are_those_of_the_values() -> None:
    objects = template(EVERYTHING)
    quota, limits = one(objects, "ResourceQuota", "ash"), one(objects, "LimitRange", "ash")
    assert {quota["metadata"]["namespace"], limits["metadata"]["namespace"]} == {"ash-sandboxes"}
    assert quota["spec"]["hard"] == {"pods": "200", "limits.memory": "400Gi"}
    assert limits["spec"]["limits"] == [{"type": "Container", "max": {"cpu": "4", "memory": "8Gi"}}]
    assert not names(template(), "ResourceQuota") | names(template(), "LimitRange")


def test_runtime_classes_carry_overhead_and_nodes() -> None:
    objects = template(EVERYTHING)
    kata = {
        name: one(objects, "RuntimeClass", name)["overhead"]["podFixed"]
        for name in ("kata-fc", "kata-clh", "kata-qemu")
    }
    assert kata == {
        "kata-fc": {"cpu": "250m", "memory": "160Mi"},
        "kata-clh": {"cpu": "250m", "memory": "180Mi"},
        "kata-qemu": {"cpu": "250m", "memory": "256Mi"},
    }
    for name in kata:
        it = one(objects, "RuntimeClass", name)
        assert it["handler"] == name
        assert it["scheduling"]["nodeSelector"] == {"katacontainers.io/kata-runtime": "true"}
    gvisor = one(objects, "RuntimeClass", "gvisor")
    assert gvisor["handler"] == "runsc" and "overhead" not in gvisor
    assert not names(template(), "RuntimeClass")


def test_an_ingress_gathers_nothing_and_cuts_no_stream() -> None:
    it = one(template(EVERYTHING), "Ingress", "ash")
    said = {name.partition("/")[2]: value for name, value in it["metadata"]["annotations"].items()}
    assert said["proxy-buffering"] == said["proxy-request-buffering"] == "off"
    assert int(said["proxy-read-timeout"]) >= 3600 and int(said["proxy-send-timeout"]) >= 3600
    assert it["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"] == {
        "name": "ash",
        "port": {"name": "http"},
    }


def test_a_gateways_route_has_no_timeout() -> None:
    (rule,) = one(template(EVERYTHING), "HTTPRoute", "ash")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert rule["backendRefs"] == [{"name": "ash", "port": 80}]


def test_metrics_are_read_with_a_key() -> None:
    it = one(template(EVERYTHING), "ServiceMonitor", "ash")
    services = [one(template(EVERYTHING), "Service", name) for name in names(template(EVERYTHING), "Service")]
    wanted = it["spec"]["selector"]["matchLabels"].items()
    assert [s["metadata"]["name"] for s in services if wanted <= s["metadata"]["labels"].items()] == ["ash"]
    (endpoint,) = it["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "metrics-key", "key": "token"}


def test_autoscaling_owns_the_number_of_hubs() -> None:
    objects = template(EVERYTHING)
    assert "replicas" not in one(objects, "Deployment", "ash-hub")["spec"]
    assert one(objects, "HorizontalPodAutoscaler", "ash-hub")["spec"]["maxReplicas"] == 6
    assert one(template(), "Deployment", "ash-hub")["spec"]["replicas"] == 2


def test_recipes_of_the_values_are_recipes_of_the_hive(tmp_path: Path) -> None:
    objects = template(EVERYTHING)
    spec = one(objects, "Deployment", "ash-hub")["spec"]["template"]["spec"]
    (volume,) = [it["configMap"] for it in spec["volumes"] if "configMap" in it]
    data = one(objects, "ConfigMap", volume["name"])["data"]
    for item in volume["items"]:
        file = tmp_path / item["path"]
        file.parent.mkdir()
        file.write_text(data[item["key"]])
    assert Catalog.load([tmp_path]).get("dice").description == "Rolls dice."
    (mount,) = [it for it in spec["containers"][0]["volumeMounts"] if it["name"] == "recipes"]
    assert environment(objects)["ASH_HUB_RECIPE_DIRS"] == f'["{mount["mountPath"]}"]'


def test_hubs_start_anew_when_a_recipe_changes() -> None:
    def noted(recipe: str) -> Any:
        hub = one(template({"recipes": {"dice": recipe}}), "Deployment", "ash-hub")
        return hub["spec"]["template"]["metadata"]["annotations"]

    assert noted("a") != noted("b")


def test_the_test_of_the_chart_runs_only_with_a_key() -> None:
    assert not names(template(), "Pod")
    (container,) = one(template(EVERYTHING), "Pod", "ash-test-spawn")["spec"]["containers"]
    variables = {it["name"]: it.get("value", it.get("valueFrom")) for it in container["env"]}
    assert variables["ASH_TOKEN"] == {"secretKeyRef": {"name": "test-key", "key": "token"}}
    assert variables["ASH_URL"] == f"http://ash.{NAMESPACE}.svc/mcp"


def test_an_uninstall_waits_for_the_job_that_ends_sandboxes() -> None:
    hooked = [it for it in template() if it["metadata"]["name"].startswith("ash-uninstall")]
    assert {it["metadata"]["annotations"]["helm.sh/hook"] for it in hooked} == {"pre-delete"}
    order = {it["kind"]: int(it["metadata"]["annotations"]["helm.sh/hook-weight"]) for it in hooked}
    assert order["Role"] < order["RoleBinding"] < order["Job"]
    script = one(template(), "Job", "ash-uninstall")["spec"]["template"]["spec"]["containers"][0]["args"][0]
    assert script.strip() == (CHART / "files/end_sandboxes.py").read_text().strip()


def test_a_new_version_of_the_chart_alone_restarts_nothing(tmp_path: Path) -> None:
    def running(chart: Path) -> dict[str, Any]:
        kinds = ("Deployment", "StatefulSet")
        return {it["metadata"]["name"]: it["spec"] for it in template(EVERYTHING, chart=chart) if it["kind"] in kinds}

    newer = shutil.copytree(CHART, tmp_path / "ash")
    about = (newer / "Chart.yaml").read_text()
    (newer / "Chart.yaml").write_text(about.replace("ersion: 0.1.0", "ersion: 0.2.0"))
    assert running(CHART) == running(newer) and len(running(CHART)) == 4
