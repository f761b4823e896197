"""What the chart may be told: the hive's settings by their names, and a clear word for what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import pytest
import yaml
from pydantic import BaseModel

from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.cli.environment import read_settings
from ash_hub.egress.limits import Limits
from ash_hub.settings import HubSettings
from tests.helm.chart import CHART, EVERYTHING, NAMESPACE, environment, notes, refusal, template

SET_BY_THE_CHART: Final = {
    *("host", "port", "advertise", "redis_url", "backend"),
    *("state_dir", "run_dir", "log_dir"),
    *("tls_cert", "tls_key"),  # an Ingress or a Gateway speaks https
    "drain_seconds",  # of the pod's grace
    "idle_exit_seconds",  # Kubernetes would start it again
}
SET_OF_THE_BACKEND: Final = {
    *("kind", "hive", "namespace", "system_namespace", "kubeconfig", "context"),
    *("canary", "egress_proxy", "egress_listen"),
}


def fields(model: type[BaseModel]) -> dict[str, Any]:
    """Return the names of a model's fields, with those of the models in it; None for what is no model."""

    def inside(annotation: Any) -> dict[str, Any] | None:
        for it in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(it, type) and issubclass(it, BaseModel):
                return fields(it)
        return None

    return {name: inside(field.annotation) for name, field in model.model_fields.items()}


def schema() -> dict[str, Any]:
    return json.loads((CHART / "values.schema.json").read_text())


def properties(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: properties(it) if "properties" in it else None for name, it in part["properties"].items()}


def test_the_settings_that_the_chart_takes_are_those_of_the_hub() -> None:
    known = {name: inside for name, inside in fields(HubSettings).items() if name not in SET_BY_THE_CHART}
    settings = schema()["properties"]["hub"]["properties"]["settings"]
    assert properties(settings) == known
    assert settings["additionalProperties"] is False


def test_the_settings_of_the_backend_that_the_chart_takes_are_those_of_the_backend() -> None:
    known = KubernetesSettings.model_fields.keys() - SET_OF_THE_BACKEND
    settings = schema()["properties"]["sandboxes"]["properties"]["settings"]
    assert settings["properties"].keys() == known
    assert settings["properties"]["egress"]["properties"].keys() == {it.name for it in dataclasses.fields(Limits)}
    assert settings["additionalProperties"] is False


def test_what_the_chart_sets_itself_are_settings_of_the_hub() -> None:
    assert SET_BY_THE_CHART <= HubSettings.model_fields.keys()
    assert SET_OF_THE_BACKEND <= KubernetesSettings.model_fields.keys()


def test_the_settings_in_values_are_settings_of_the_hub() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["hub"]["settings"].keys() <= HubSettings.model_fields.keys()


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    def compare(value: Any, part: Mapping[str, Any], where: str) -> None:
        if "properties" not in part or not isinstance(value, dict):
            return
        given = cast("dict[str, Any]", value)
        free = {"global"} if where == "" else set[str]()
        if not where.endswith(".settings"):
            assert given.keys() == part["properties"].keys() - free, where
        for name, it in given.items():
            compare(it, part["properties"][name], f"{where}.{name}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema(), "")


def settings_of(values: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> HubSettings:
    """Return the settings that a hub reads in the environment that the chart gives it."""

    def as_kubernetes(found: re.Match[str]) -> str:
        return "$(POD_IP)" if found[1] else "10.1.2.3"

    for name in os.environ:
        if name.startswith("ASH_HUB_"):
            monkeypatch.delenv(name)
    for name, value in environment(template(values)).items():
        if isinstance(value, str):
            monkeypatch.setenv(name, re.sub(r"\$(\$?)\(POD_IP\)", as_kubernetes, value))
    return read_settings({})


def test_a_hub_reads_its_settings_as_they_are_in_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "idle_seconds": 600,
        "keep": False,
        "log_level": "debug",
        "public_url": "https://hive.example",
        "allowed_hosts": ["hive.test"],
        "redis_prefix": "$(POD_IP)",
        "limits": {"sandboxes": 50, "sandboxes_per_owner": None},
        "relay": {"max_direct_body_bytes": 8589934592, "idle_stream_seconds": None},
        "seed": {"images": {"Registry.test/Team-*": "general"}},
        "spawn": {"node_selectors": {"pool": ["a", "b"]}, "network": ["*.example.com"]},
        "auth": {"oidc": {"issuer": "https://login.example", "audience": ["hive"]}, "open_paths": ["/metrics"]},
    }
    settings = settings_of({"hub": {"settings": given}}, monkeypatch)
    assert settings.idle_seconds == 600 and settings.keep is False and settings.log_level == "debug"
    assert settings.public_url == "https://hive.example" and settings.redis_prefix == "$(POD_IP)"
    assert settings.limits.sandboxes == 50 and settings.limits.sandboxes_per_owner is None
    assert settings.limits.starting == HubSettings.model_fields["limits"].default.starting
    assert settings.relay.max_direct_body_bytes == 8589934592 and settings.relay.idle_stream_seconds is None
    assert settings.seed.images["Registry.test/Team-*"] == "general"
    assert settings.spawn.node_selectors == {"pool": ("a", "b")} and settings.spawn.network == ("*.example.com",)
    assert settings.auth.oidc is not None and settings.auth.oidc.audience == ("hive",)
    assert settings.auth.open_paths == ("/metrics", "/readyz")  # the probes' own


def test_a_hub_is_told_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of({}, monkeypatch)
    assert settings.keep is True
    assert settings.advertise == "10.1.2.3:8422"
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == "redis://ash-redis:6379/0"
    assert settings.auth.open_paths == ("/readyz",)


def test_the_backend_is_told_its_settings_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of({}, monkeypatch).backend == {
        "kind": "kubernetes",
        "hive": "ash",
        "namespace": "ash-sandboxes",
        "system_namespace": NAMESPACE,
        "image": "localhost/ash/recipes:dev",
        "image_pull_policy": "IfNotPresent",
        "canary": "10.1.2.3:8420",
        "egress_proxy": f"ash-egress.{NAMESPACE}.svc.cluster.local:3128",
        "egress_listen": "0.0.0.0:8423",
    }
    backend = settings_of(EVERYTHING, monkeypatch).backend
    read = KubernetesSettings.model_validate(backend)
    assert read.workspace == "10Gi" and read.egress.encrypted_hello and read.private_egress
    assert "egress_proxy" not in settings_of({"egress": {"enabled": False}}, monkeypatch).backend


@pytest.mark.parametrize("service", ["ash", "control-plane", "gateway"])
def test_a_hub_answers_to_the_names_of_its_services(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = f"{service}.{NAMESPACE}"
    allowed = settings_of({}, monkeypatch).allowed_hosts
    assert {service, inside, f"{inside}.svc", f"{inside}.svc.cluster.local"} <= set(allowed)


def test_a_hub_answers_to_the_names_of_its_ingress_and_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"hive.example", "hive2.example"} <= set(settings_of(EVERYTHING, monkeypatch).allowed_hosts)


def test_routers_have_the_settings_of_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = template(EVERYTHING)
    hub, router = environment(objects), environment(objects, "ash-router")
    own = ("POD_IP", "ASH_HUB_ADVERTISE", "ASH_HUB_BACKEND__CANARY")
    assert {name: value for name, value in hub.items() if name not in own} == router


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hub": {"replicas": "three"}}, "/hub/replicas"),
        ({"hub": {"settings": {"idel_seconds": 5}}}, "idel_seconds"),
        ({"hub": {"settings": {"limits": {"sandbox": 5}}}}, "sandbox"),
        ({"hub": {"settings": {"redis_url": "redis://x"}}}, "redis_url"),
        ({"hub": {"settings": {"auth": {"oidc": {"issuer": "https://login.example"}}}}}, "audience"),
        ({"sandboxes": {"podSecurity": "strict"}}, "/sandboxes/podSecurity"),
        ({"sandboxes": {"settings": {"hive": "x"}}}, "hive"),
        ({"sandboxes": {"settings": {"cpu": 2}}}, "/sandboxes/settings/cpu"),
        ({"redis": {"url": "http://redis.example"}}, "/redis/url"),
        ({"redis": {"persistence": {"size": "a lot"}}}, "/redis/persistence/size"),
        ({"recipes": {"Dice": "x"}}, "Dice"),
        ({"networkPolicies": {"blocked": ["10.0.0.0"]}}, "/networkPolicies/blocked/0"),
        ({"egress": {"reach": ["10.0.0.0/8"]}}, "/egress/reach/0"),
        ({"egress": {"enabled": False}, "sandboxes": {"settings": {"internet_by_proxy": True}}}, "egress.enabled"),
        ({"sandboxes": {"settings": {"egress": {"connection": 3}}}}, "connection"),
        ({"httpRoute": {"timeouts": {"request": "5 minutes"}}}, "/httpRoute/timeouts/request"),
        ({"runtimeClasses": {"wasm": {"enabled": True}}}, "handler"),
        ({"uninstall": {"timeoutSeconds": 5}}, "/uninstall/timeoutSeconds"),
        ({"replicas": 3}, "replicas"),
        ({"redis": {"enabled": False}}, "several hubs are one hive only with a Redis"),
        ({"redis": {"enabled": False}, "hub": {"replicas": 1}, "router": {"enabled": True}}, "a router reads its"),
        ({"redis": {"url": "redis://redis.example"}}, "redis.enabled=false"),
        ({"sandboxes": {"namespace": NAMESPACE}}, "sandboxes.createNamespace=false"),
        ({"ingress": {"enabled": True}}, "ingress.hosts"),
        ({"httpRoute": {"enabled": True, "hostnames": ["x"]}}, "httpRoute.parentRefs"),
        ({"httpRoute": {"enabled": True, "parentRefs": [{"name": "x"}]}}, "httpRoute.hostnames"),
        ({"serviceMonitor": {"enabled": True}}, "serviceMonitor.keySecret.name"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused_by_name(values: dict[str, Any], words: str) -> None:
    assert words in refusal(values)


def test_the_notes_say_how_to_make_a_key_and_how_to_connect(tmp_path: Path) -> None:
    said = notes({}, tmp_path)
    assert f"kubectl exec -n {NAMESPACE} deploy/ash-hub -- ash key new --name first" in said
    assert f"kubectl port-forward -n {NAMESPACE} svc/ash 8420:80" in said
    assert f"http://ash.{NAMESPACE}.svc/mcp" in said


def test_the_notes_name_the_ingress_where_there_is_one(tmp_path: Path) -> None:
    said = notes(EVERYTHING, tmp_path)
    assert "https://hive.example/mcp" in said and "Tokens of https://login.example are let in" in said
