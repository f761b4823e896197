"""What the pod of a sandbox looks like, and what its status means."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from ash_hub.backends.base import Exit, Phase
from ash_hub.backends.kubernetes.pods import instance_of, pod_of, record_patch
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_mcp.errors import ConfigError
from ash_mcp.types import Cause, Endpoint, ResourceAmounts, Resources, SandboxId, SandboxSpec

SPEC = SandboxSpec(
    id=SandboxId("sbx-a"),
    recipe="general",
    server={"python": "ash_recipes.general:server"},
    public_key="p",
    key="k",
    record={"owner": "local"},
    labels={"team": "a team"},
)
SETTINGS = KubernetesSettings(image="ash/recipes:1")


def container(pod: Any) -> Any:
    [found] = pod["spec"]["containers"]
    return found


def limited(*, cpu: str | None = None, memory: str | None = None) -> ResourceAmounts:
    return ResourceAmounts(cpu=cpu, memory=memory)


def test_a_pod_is_as_restricted_as_pod_security_can_ask() -> None:
    pod = pod_of(SPEC, SETTINGS)
    spec, main = pod["spec"], container(pod)
    assert spec["restartPolicy"] == "Never"
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all(volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"])
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/workspace", "/home/ash", "/tmp"}


def test_everything_of_a_spec_reaches_the_pod() -> None:
    spec = replace(
        SPEC,
        image="team/own:2",
        ports=(3000,),
        env={"A": "1"},
        resources=Resources(limited(cpu="250m", memory="128Mi"), limited(cpu="1", memory="1Gi")),
        node_selector={"pool": "agents"},
        runtime_class="gvisor",
        network="internet",
    )
    pod = pod_of(spec, SETTINGS.model_copy(update={"node_selector": {"os": "linux"}, "image_pull_secrets": ("s",)}))
    main = container(pod)
    assert main["image"] == "team/own:2"
    assert [port["containerPort"] for port in main["ports"]] == [8421, 3000]
    assert main["resources"] == {
        "requests": {"cpu": "250m", "memory": "128Mi"},
        "limits": {"cpu": "1", "memory": "1Gi"},
    }
    assert pod["spec"]["nodeSelector"] == {"os": "linux", "pool": "agents"}
    assert pod["spec"]["runtimeClassName"] == "gvisor"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "s"}]
    variables = {each["name"]: each["value"] for each in main["env"]}
    assert variables["ASH_SANDBOX_KEY"] == "k" and variables["ASH_LISTEN"] == "0.0.0.0:8421"
    assert json.loads(variables["ASH_RUNNER_CONFIG"])["env"] == {"A": "1"}
    assert pod["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "ash",
        "ash/hive": "ash",
        "ash/sandbox": "sbx-a",
        "ash/network": "internet",
    }


OWN = replace(
    SPEC, recipe="own", server={"image": {"port": 3000, "path": "/serve"}}, image="team/own:2", key="", env={"A": "1"}
)


def test_an_image_that_is_a_server_by_itself_runs_as_it_is_and_is_as_restricted() -> None:
    pod = pod_of(replace(OWN, ports=(9000,)), SETTINGS)
    main = container(pod)
    assert main["image"] == "team/own:2" and not {"command", "args", "workingDir", "envFrom"} & main.keys()
    assert [port["containerPort"] for port in main["ports"]] == [3000, 9000]
    assert {each["name"]: each["value"] for each in main["env"]} == {"HOME": "/home/ash", "TMPDIR": "/tmp", "A": "1"}
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/home/ash", "/tmp"}
    ours = pod_of(SPEC, SETTINGS)
    assert main["securityContext"] == container(ours)["securityContext"]
    for name in ("securityContext", "automountServiceAccountToken", "enableServiceLinks", "restartPolicy"):
        assert pod["spec"][name] == ours["spec"][name]


def test_a_recipe_may_say_what_such_an_image_runs() -> None:
    server = {"image": {"port": 3000, "path": "/mcp", "command": ("serve",), "args": ("--all", "$(A)")}}
    main = container(pod_of(replace(OWN, server=server), SETTINGS))
    assert (main["command"], main["args"]) == (["serve"], ["--all", "$$(A)"])


def test_kubernetes_puts_no_variables_into_what_a_recipe_says() -> None:
    for spec in (SPEC, OWN):
        main = container(pod_of(replace(spec, env={"A": "$(HOME) $$ $x"}), SETTINGS))
        assert any("$$(HOME) $$$$ $$x" in each["value"] for each in main["env"])


def test_a_callers_variables_are_in_its_secret_and_count_before_the_recipes() -> None:
    pod = pod_of(replace(OWN, variables={"A": "2", "HOME": "/x", "TOKEN": "s3cret"}), SETTINGS)
    main = container(pod)
    assert main["envFrom"] == [{"secretRef": {"name": "sbx-a"}}]
    assert [each["name"] for each in main["env"]] == ["TMPDIR"], "env would hide what envFrom brings"
    assert "s3cret" not in json.dumps(pod)


def test_such_a_server_is_where_its_pod_says() -> None:
    def endpoint(change: dict[str, str]) -> Endpoint | None:
        pod = pod_of(OWN, SETTINGS)
        pod["metadata"]["annotations"] |= change
        running: dict[str, Any] = {"name": "sandbox", "state": {"running": {}}}
        return instance_of({**pod, "status": {"podIP": "10.0.0.7", "containerStatuses": [running]}}).endpoint

    assert endpoint({}) == Endpoint(host="10.0.0.7", port=3000, server_path="/serve")
    for broken in ("", "[]", '{"port": "x"}'):  # then it would have to prove that it is a runner
        assert endpoint({"ash/server": broken}) == Endpoint(host="10.0.0.7", port=8421)


def test_such_a_recipe_must_name_its_image() -> None:
    with pytest.raises(ConfigError, match="recipe own is an image that serves MCP by itself, but names none"):
        pod_of(replace(OWN, image=None), SETTINGS)


@pytest.mark.parametrize(
    "state",
    [
        {"terminated": {"reason": "StartError", "exitCode": 128, "message": "exec: /opt/ash/bin/python: not found"}},
        {"waiting": {"reason": "CreateContainerError", "message": "no such file: /opt/ash/bin/python"}},
    ],
)
def test_an_image_without_the_runner_is_told_what_to_do(state: dict[str, Any]) -> None:
    def ends(spec: SandboxSpec) -> Exit | None:
        status = {"containerStatuses": [{"name": "sandbox", "state": state}]}
        return instance_of({**pod_of(spec, SETTINGS), "status": status}).exit

    exit = ends(SPEC)
    assert exit is not None and exit.cause is Cause.HIVE
    assert "The image does not hold the runner: build it on recipes/Dockerfile, or" in exit.message
    other = ends(OWN)
    assert other is not None and "runner" not in other.message


def test_a_sandbox_without_a_network_is_told_what_must_refuse_it() -> None:
    def told(network: str, canary: str | None) -> str | None:
        pod = pod_of(replace(SPEC, network=network), SETTINGS.model_copy(update={"canary": canary}))
        variables = {each["name"]: each["value"] for each in container(pod)["env"]}
        return json.loads(variables["ASH_RUNNER_CONFIG"]).get("canary")

    assert told("none", "10.0.0.1:8420") == "10.0.0.1:8420"
    assert told("internet", "10.0.0.1:8420") is None and told("none", None) is None


@pytest.mark.parametrize("address", ["hub:8420", "10.0.0.1", "10.0.0.1:port", ""])
def test_a_canary_is_an_address_since_no_name_is_looked_up_without_a_network(address: str) -> None:
    with pytest.raises(ValidationError, match="canary"):
        KubernetesSettings(canary=address)
    for good in ("10.0.0.1:8420", "fd00::1:8420", "[fd00::1]:8420"):
        assert KubernetesSettings(canary=good).canary == good


def test_a_template_goes_over_the_pod() -> None:
    template = {
        "spec": {"tolerations": [], "containers": [{"name": "sandbox", "resources": {"limits": {"gpu": "1"}}}]}
    }
    pod = pod_of(SPEC, SETTINGS.model_copy(update={"pod_template": template}))
    assert pod["spec"]["tolerations"] == []
    assert container(pod)["resources"]["limits"] == {"cpu": "2", "memory": "2Gi", "gpu": "1"}
    assert container(pod)["image"] == "ash/recipes:1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mounts": {"/opt/recipe": "/srv/recipe"}}, "put it into an image"),
        ({"network": ("example.com",)}, "this hive has no egress proxy.*ASH_HUB_BACKEND__EGRESS_PROXY"),
        ({"network": "everything"}, "no network policy"),
        ({"resources": Resources(limits=limited(memory="16Mi"))}, "give at least 96Mi"),
        ({"resources": Resources(limited(memory="1Gi"), limited(memory="512Mi"))}, "is over its limit"),
        ({"resources": Resources(limited(cpu="2"), limited(cpu="1"))}, "is over its limit"),
        ({"resources": Resources(limits=limited(memory="plenty"))}, "'plenty' is not an amount of memory"),
    ],
)
def test_what_no_pod_can_be_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pod_of(replace(SPEC, **change), SETTINGS)


def test_a_spec_without_an_image_needs_the_settings_one() -> None:
    with pytest.raises(ConfigError, match="ASH_HUB_BACKEND__IMAGE"):
        pod_of(SPEC, KubernetesSettings())


def test_a_default_request_gives_way_to_a_smaller_limit() -> None:
    spec = replace(SPEC, resources=Resources(limits=limited(cpu="50m", memory="128Mi")))
    assert container(pod_of(spec, SETTINGS))["resources"]["requests"] == {"cpu": "50m", "memory": "128Mi"}


def seen(status: dict[str, Any], **metadata: Any) -> Any:
    return {**pod_of(SPEC, SETTINGS), "metadata": {**pod_of(SPEC, SETTINGS)["metadata"], **metadata}, "status": status}


def state(**found: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "beside", "state": {}}, {"name": "sandbox", "state": found}]}


def disrupted(reason: str, message: str = "") -> dict[str, Any]:
    return {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}]}


def test_a_running_pod_is_dialled_at_its_address() -> None:
    instance = instance_of(seen({"phase": "Running", "podIP": "10.0.0.7", **state(running={})}))
    assert (instance.phase, instance.endpoint) == (Phase.RUNNING, Endpoint(host="10.0.0.7", port=8421))
    assert dict(instance.record) == {"owner": "local"} and dict(instance.labels) == {"team": "a team"}
    assert instance.revision == 0


@pytest.mark.parametrize(
    ("status", "waits_for"),
    [
        ({"phase": "Pending"}, None),
        ({"phase": "Pending", **state(waiting={"reason": "ContainerCreating"})}, None),
        ({"phase": "Running", **state(running={})}, None),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]},
            "no node takes it: 0/3 nodes are available",
        ),
    ],
)
def test_a_pod_that_does_not_run_yet_is_starting_and_says_what_it_waits_for(
    status: Any, waits_for: str | None
) -> None:
    instance = instance_of(seen(status))
    assert (instance.phase, instance.endpoint, instance.waits_for) == (Phase.STARTING, None, waits_for)


def test_what_the_events_say_is_what_a_pod_waits_for_unless_its_status_says_more() -> None:
    assert (
        instance_of(seen({"phase": "Pending"}), "FailedMount: no such secret").waits_for
        == "FailedMount: no such secret"
    )
    unscheduled = {"conditions": [{"type": "PodScheduled", "status": "False", "message": "no node"}]}
    assert instance_of(seen(unscheduled), "old words").waits_for == "no node takes it: no node"
    running = {"phase": "Running", "podIP": "10.0.0.7", **state(running={})}
    assert instance_of(seen(running), "old words").waits_for is None


@pytest.mark.parametrize(
    ("status", "message", "cause"),
    [
        (state(terminated={"exitCode": 1}), "exited with code 1", Cause.AGENT),
        (state(terminated={"exitCode": 2, "message": "no module"}), "exited with code 2: no module", Cause.AGENT),
        (state(terminated={"exitCode": 137}), "killed by SIGKILL", Cause.AGENT),
        (state(terminated={"exitCode": 137, "reason": "OOMKilled"}), "killed: out of memory", Cause.LIMIT),
        (state(terminated={"exitCode": 255}), "exited with code 255", Cause.AGENT),
        (
            state(waiting={"reason": "ErrImagePull", "message": "not found"}),
            "its image cannot be pulled: not found",
            Cause.HIVE,
        ),
        (
            state(waiting={"reason": "CreateContainerError"}),
            "its container cannot be made: CreateContainerError",
            Cause.HIVE,
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
            "evicted by its node: low on memory",
            Cause.HOST,
        ),
        (
            {"phase": "Failed", **state(terminated={"exitCode": 137}), **disrupted("PreemptionByScheduler")},
            "preempted by a pod of higher priority",
            Cause.HOST,
        ),
        (
            {"phase": "Failed", **disrupted("EvictionByEvictionAPI", "drain")},
            "evicted, as when its node is drained: drain",
            Cause.OPERATOR,
        ),
        ({"phase": "Failed", "message": "node shutdown"}, "node shutdown", Cause.HOST),
        ({"phase": "Failed", **disrupted("NewInKubernetes")}, "NewInKubernetes", Cause.HOST),
    ],
)
def test_an_ended_pod_says_why_and_who_caused_it(status: Any, message: str, cause: Cause) -> None:
    instance = instance_of(seen(status))
    assert (instance.phase, instance.exit, instance.endpoint) == (Phase.ENDED, Exit(message, cause), None)


def test_an_eviction_that_only_an_event_told_of_is_why_a_pod_ended() -> None:
    completed = {"phase": "Succeeded", **state(terminated={"exitCode": 0, "reason": "Completed"})}
    assert instance_of(seen(completed)).exit == Exit("exited with code 0", Cause.AGENT)
    evicted = instance_of(seen(completed), eviction="Usage of EmptyDir exceeds the limit. ")
    assert evicted.exit == Exit("evicted by its node: Usage of EmptyDir exceeds the limit.", Cause.LIMIT)
    running = instance_of(seen({"phase": "Running", "podIP": "10.0.0.7", **state(running={})}), eviction="soon")
    assert (running.phase, running.exit) == (Phase.RUNNING, None)


def test_a_pod_that_is_being_deleted_has_ended_while_its_container_still_runs() -> None:
    running = {"phase": "Running", "podIP": "10.0.0.7", **state(running={})}
    instance = instance_of(seen(running, deletionTimestamp="2026-01-01T00:00:00Z"))
    assert (instance.phase, instance.exit) == (Phase.ENDED, Exit("its pod is being deleted", Cause.OPERATOR))


@pytest.mark.parametrize("annotations", [None, {"ash/record": "{", "ash/labels": "[]", "ash/revision": "x"}])
def test_annotations_that_somebody_has_broken_are_no_end_of_the_hive(annotations: Any) -> None:
    instance = instance_of(seen({"phase": "Pending"}, annotations=annotations))
    assert (dict(instance.record), dict(instance.labels), instance.revision) == ({}, {}, 0)


def test_a_record_is_replaced_only_at_its_revision() -> None:
    test, record, revision = record_patch({"a": 1}, 3)
    assert test == {"op": "test", "path": "/metadata/annotations/ash~1revision", "value": "3"}
    assert record["value"] == '{"a":1}' and revision["value"] == "4"
