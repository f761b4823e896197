"""What `ash doctor` says of a real cluster, and that a hive needs no more of it than `rights.py` lists."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.checks import Check
from ash_hub.backends.documents import DocumentKind
from ash_hub.backends.kubernetes.api import Json
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_hub.backends.kubernetes.image_server import variables_secret
from ash_hub.backends.kubernetes.pods import sandbox_labels
from ash_hub.backends.kubernetes.probe import probe
from ash_hub.backends.kubernetes.rights import RIGHTS, Place, Right
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from tests.kubernetes.conftest import NAMESPACES, Cluster
from tests.kubernetes.pod_parts import IMAGE, fresh, settings_of

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]

ROLES = "/apis/rbac.authorization.k8s.io/v1"


async def look(settings: KubernetesSettings) -> dict[str, Check]:
    return {check.name: check for check in await probe(settings)}


def rules(rights: Iterable[Right]) -> list[Json]:
    return [{"apiGroups": [each.group], "resources": [each.resource], "verbs": list(each.verbs)} for each in rights]


@asynccontextmanager
async def account(cluster: Cluster, folder: Path, rights: Iterable[Right]) -> AsyncGenerator[Path]:
    """Make an account that may do this and no more, and its kubeconfig."""
    name, where = f"ash-test-{secrets.token_hex(4)}", cluster.namespace
    subject = {"kind": "ServiceAccount", "name": name, "namespace": where}
    inside = f"{ROLES}/namespaces/{where}"
    wide = [right for right in rights if right.place is Place.CLUSTER]
    await cluster.api.create(f"{NAMESPACES}/{where}/serviceaccounts", {"metadata": {"name": name}})
    made = {"metadata": {"name": name}}
    try:
        for path, kind, granted in (
            (inside, "role", rules(right for right in rights if right not in wide)),
            (ROLES, "clusterrole", rules(wide)),
        ):
            title = {"role": "Role", "clusterrole": "ClusterRole"}[kind]
            reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": title, "name": name}
            await cluster.api.create(f"{path}/{kind}s", {**made, "rules": granted})
            await cluster.api.create(f"{path}/{kind}bindings", {**made, "roleRef": reference, "subjects": [subject]})
        path = f"{NAMESPACES}/{where}/serviceaccounts/{name}/token"
        token = await cluster.api.create(path, {"spec": {"expirationSeconds": 600}})
        yield kubeconfig_of(folder, token["status"]["token"])
    finally:
        with anyio.CancelScope(shield=True):
            for kind in ("clusterrolebindings", "clusterroles"):
                await cluster.api.delete(f"{ROLES}/{kind}/{name}")


def kubeconfig_of(folder: Path, token: str) -> Path:
    """Write the kubeconfig of the tests with this token in the place of its user."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(Path(os.environ["ASH_TEST_KUBECONFIG"]).read_text())
    for user in found["users"]:
        user["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(found))
    return path


async def test_an_account_with_the_rights_of_the_list_runs_a_hive(cluster: Cluster, tmp_path: Path) -> None:
    async with account(cluster, tmp_path, RIGHTS) as kubeconfig:
        settings = settings_of(cluster, kubeconfig=kubeconfig)
        found = await look(settings)
        assert found["account"].detail.startswith(f"system:serviceaccount:{cluster.namespace}:ash-test-")
        assert [name for name, check in found.items() if check.required and not check.ok] == []
        assert all(check.ok for name, check in found.items() if name.startswith("right to "))
        lost = fresh(variables={"A": "1"})  # whose pod never came
        kept = f"/api/v1/namespaces/{cluster.namespace}/secrets"
        await cluster.api.create(kept, variables_secret(lost, sandbox_labels(settings.hive, lost.id), 0.0))
        async with KubernetesBackend(settings) as backend:
            with anyio.fail_after(10):
                while await cluster.api.get(f"{kept}/{lost.id}") is not None:
                    await anyio.sleep(0.1)
            spec = fresh()
            made = await backend.create(spec)
            seen = await backend.get(spec.id)
            assert seen is not None
            await backend.annotate(made.id, {"a": 1}, revision=0)
            await backend.logs(made.id)
            await backend.delete(made.id, grace_seconds=0)
            own = fresh(image=IMAGE, server={"image": {"port": 3000, "path": "/mcp"}}, variables={"A": "1"})
            await backend.create(own)
            await backend.delete(own.id, grace_seconds=0)
            assert await backend.list() == [] and backend.unready() is None
            for kind in DocumentKind:
                await backend.documents.replace(kind, "keys", b"1", instead_of=None)
                await backend.documents.keep(kind, "keys", b"1")
                assert await backend.documents.read(kind, "keys") == b"1"
                for name, used_at in (await backend.documents.used(kind)).items():
                    await backend.documents.drop(kind, name, used_at=used_at)


async def test_a_right_that_is_missing_is_named(cluster: Cluster, tmp_path: Path) -> None:
    fewer = [replace(right, verbs=tuple(verb for verb in right.verbs if verb != "patch")) for right in RIGHTS]
    fewer = [right for right in fewer if right.place is not Place.CLUSTER]
    async with account(cluster, tmp_path, fewer) as kubeconfig:
        found = await look(settings_of(cluster, kubeconfig=kubeconfig))
    refused = {name.removeprefix("right to "): check for name, check in found.items() if name.startswith("right to ")}
    refused = {name: check for name, check in refused.items() if not check.ok}
    assert refused.keys() == {"pods", "configmaps", "secrets", "secrets of spawns", "runtimeclasses"}
    assert f"not allowed to patch in {cluster.namespace}" in refused["pods"].detail


async def test_a_namespace_that_is_missing_is_said(cluster: Cluster) -> None:
    found = await look(settings_of(cluster, namespace="ash-test-none"))
    check = found["namespace ash-test-none"]
    assert not check.ok and check.required


async def test_policies_level_and_quota_are_seen_as_they_are(cluster: Cluster) -> None:
    settings = settings_of(cluster)
    before = await look(settings)
    assert not before["network policies"].ok and not before["Pod Security"].ok
    where = f"{NAMESPACES}/{cluster.namespace}"
    policy = {"podSelector": {"matchLabels": {"ash/hive": settings.hive}}, "policyTypes": ["Ingress", "Egress"]}
    policies = f"/apis/networking.k8s.io/v1/namespaces/{cluster.namespace}/networkpolicies"
    await cluster.api.create(policies, {"metadata": {"name": "closed"}, "spec": policy})
    label = {"op": "add", "path": "/metadata/labels/pod-security.kubernetes.io~1enforce", "value": "restricted"}
    await cluster.api.patch(where, [label])
    await cluster.api.create(
        f"{where}/resourcequotas", {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    )
    found = await look(settings)
    with anyio.fail_after(20):  # admission hears of a quota a little later
        while found["pod"].ok or "0 of 0 pods" not in found["quota"].detail:
            await anyio.sleep(0.2)
            found = await look(settings)
    assert found["network policies"].ok and found["Pod Security"].ok
    assert "exceeded quota" in found["pod"].detail and not found["quota"].ok and not found["pod"].required


async def test_a_pod_that_breaks_the_level_of_the_namespace_is_found(cluster: Cluster) -> None:
    where = f"{NAMESPACES}/{cluster.namespace}"
    label = {"op": "add", "path": "/metadata/labels/pod-security.kubernetes.io~1enforce", "value": "restricted"}
    await cluster.api.patch(where, [label])
    settings = settings_of(cluster)
    assert (await look(settings))["pod"].ok
    template = {"spec": {"hostNetwork": True}}
    check = (await look(settings.model_copy(update={"pod_template": template})))["pod"]
    assert not check.ok and check.required and "violates PodSecurity" in check.detail


async def test_a_runtime_class_that_the_cluster_lacks_is_said(cluster: Cluster) -> None:
    found = await look(settings_of(cluster, runtime_class="ash-test-none"))
    assert not found["runtime class"].ok and found["runtime class"].required
    assert not found["pod"].ok and "ash-test-none" in found["pod"].detail
