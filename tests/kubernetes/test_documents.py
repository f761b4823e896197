"""The hive's documents in a real cluster: the suite of every backend, and what only an API server can show."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
import yaml

from ash_hub.backends.documents import DocumentKind, Documents
from ash_hub.backends.kept_keys import read_api_keys
from ash_hub.backends.kubernetes.api import open_api
from ash_hub.backends.kubernetes.documents import KubernetesDocuments
from ash_hub.testing.document_checks import DOCUMENT_CHECKS
from ash_mcp.errors import ConnectFailed
from tests.hive_process import ASH
from tests.kubernetes.conftest import NAMESPACES, Cluster

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]

SETS, KEYS = DocumentKind.TOOLSETS, DocumentKind.KEYS


def replica(cluster: Cluster, *, namespace: str | None = None) -> KubernetesDocuments:
    where = namespace or cluster.namespace
    return KubernetesDocuments(cluster.api, hive="h", namespace=where, key_namespace=where)


@pytest.mark.parametrize("check", DOCUMENT_CHECKS, ids=lambda check: check.__name__)
async def test_documents_pass_the_suite(
    check: Callable[[Documents, Documents], Awaitable[None]], cluster: Cluster
) -> None:
    await check(replica(cluster), replica(cluster))


async def test_keeps_and_drops_at_once_lose_nothing(cluster: Cluster) -> None:
    one, other = replica(cluster), replica(cluster)
    for _ in range(5):
        await one.keep(SETS, "a", b"{}")
        seen = (await other.used(SETS))["a"]
        async with anyio.create_task_group() as group:
            group.start_soon(one.keep, SETS, "a", b"{}")
            for documents in (one, other):
                group.start_soon(partial(documents.drop, SETS, "a", used_at=seen))
        assert await other.read(SETS, "a") == b"{}"


async def test_a_namespace_that_is_missing_is_said_and_can_be_tried_again(cluster: Cluster) -> None:
    nowhere = replica(cluster, namespace=f"{cluster.namespace}-none")
    assert await nowhere.read(SETS, "a") is None
    with pytest.raises(ConnectFailed, match="not found") as failure:
        await nowhere.keep(SETS, "a", b"{}")
    assert failure.value.retryable


@asynccontextmanager
async def as_account(cluster: Cluster, folder: Path) -> AsyncGenerator[Cluster]:
    """Connect as the account `default` of the namespace, which may do nothing unless a Role says so."""
    account = f"{NAMESPACES}/{cluster.namespace}/serviceaccounts/default"
    made = await cluster.api.create(f"{account}/token", {"spec": {"expirationSeconds": 600}})
    named = yaml.safe_load(await anyio.Path(os.environ["ASH_TEST_KUBECONFIG"]).read_text())
    for user in named["users"]:
        user["user"] = {"token": made["status"]["token"]}
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(named))
    async with open_api(kubeconfig, None) as api:
        yield Cluster(api, cluster.namespace)


async def test_an_account_needs_the_verbs_that_the_refusal_names_and_no_more(cluster: Cluster, tmp_path: Path) -> None:
    async with as_account(cluster, tmp_path) as bound:
        with pytest.raises(ConnectFailed, match=r"cannot get .*needs get, list, create, patch and delete of secrets"):
            await replica(bound).read(KEYS, "keys")
        verbs, resources = ["get", "list", "watch", "create", "patch", "delete"], ["configmaps", "secrets"]
        role = {
            "metadata": {"name": "ash"},
            "rules": [{"apiGroups": [""], "resources": resources, "verbs": verbs}],
        }
        binding = {
            "metadata": {"name": "ash"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "ash"},
            "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": cluster.namespace}],
        }
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{cluster.namespace}"
        await cluster.api.create(f"{rbac}/roles", role)
        await cluster.api.create(f"{rbac}/rolebindings", binding)
        with anyio.fail_after(20):
            while not await may_read(replica(bound)):
                await anyio.sleep(0.1)
        await replica(bound).replace(KEYS, "keys", b"1", instead_of=None)
        await replica(bound).replace(KEYS, "keys", b"2", instead_of=b"1")
        told = anyio.Event()

        def tell(body: bytes | None) -> None:
            if body == b"3":
                told.set()

        async with anyio.create_task_group() as group:
            group.start_soon(replica(bound).follow, KEYS, "keys", tell)
            await replica(bound).replace(KEYS, "keys", b"3", instead_of=b"2")
            with anyio.fail_after(2):
                await told.wait()
            group.cancel_scope.cancel()
        for _ in range(2):
            await replica(bound).keep(SETS, "a", b"{}")
        used = await replica(bound).used(SETS)
        await replica(bound).drop(SETS, "a", used_at=used["a"])
        assert await replica(bound).read(SETS, "a") is None


async def may_read(documents: Documents) -> bool:
    try:
        await documents.used(KEYS)
        return await documents.read(SETS, "a") is None
    except ConnectFailed:
        return False


async def test_ash_key_makes_and_revokes_keys_in_the_cluster(cluster: Cluster) -> None:
    environ = {
        **os.environ,
        "ASH_HUB_BACKEND__KIND": "kubernetes",
        "ASH_HUB_BACKEND__HIVE": "h",
        "ASH_HUB_BACKEND__NAMESPACE": cluster.namespace,
        "ASH_HUB_BACKEND__KUBECONFIG": os.environ["ASH_TEST_KUBECONFIG"],
    }

    async def ash(*words: str) -> str:
        with anyio.fail_after(60):
            return (await anyio.run_process([*ASH, "key", *words], env=environ)).stdout.decode()

    assert (await ash("new", "--name", "ci")).startswith("ash_")
    assert [key.name for key in await read_api_keys(replica(cluster))] == ["ci"]
    assert "ci" in await ash("list")
    await ash("revoke", "ci")
    assert await read_api_keys(replica(cluster)) == []
