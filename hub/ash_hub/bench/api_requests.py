"""Requests of one hive to the API server, counted by the server itself, whatever else runs on its cluster.

The server counts requests by flow schema. So the hive gets an account of its own, and flow schemas take what that
account asks for: one what a spawn is made of, the other all the rest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from ash_hub.backends.kubernetes.api import Api, ApiRefusal, Json, open_api
from ash_hub.backends.kubernetes.rights import RIGHTS, Place
from ash_mcp.errors import ConnectFailed

__all__ = ["CountedAccount", "open_account"]

_RBAC: Final = "/apis/rbac.authorization.k8s.io/v1/namespaces"
_SCHEMAS: Final = "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas"
_LEVEL: Final = "workload-low"
"""Where the requests of accounts go by default."""
_BEFORE_DEFAULTS: Final = 500
_SPAWNS: Final = ["pods", "pods/log", "configmaps"]
"""Sandboxes, and the documents that hold their tools."""
_TOKEN_SECONDS: Final = 3600
_EFFECT_SECONDS: Final = 20.0
"""For the server to take note of a role and a flow schema."""


@dataclass(frozen=True, slots=True)
class CountedAccount:
    """A service account with the rights of a hive."""

    kubeconfig: Path
    _api: Api
    _name: str

    async def requests(self) -> tuple[int, int]:
        """Return how many requests the server has had from it, for pods and documents and for all else.

        A watch is one.
        """
        lines = (await self._api.text("/metrics")).decode().splitlines()
        counters = [line for line in lines if line.startswith("apiserver_flowcontrol_dispatched_requests_total{")]
        spawns, rest = (
            sum(int(float(line.rpartition(" ")[2])) for line in counters if f'flow_schema="{name}"' in line)
            for name in (self._name, f"{self._name}-rest")
        )
        return spawns, rest


@asynccontextmanager
async def open_account(
    api: Api, name: str, *, namespace: str, key_namespace: str
) -> AsyncGenerator[CountedAccount | None]:
    """Make an account that may do what a hive must, while the context is open; None where this one may not make it.

    Args:
        name: Of the account, its roles and its flow schema. That is an object of the whole cluster.
        namespace: Of the sandboxes.
        key_namespace: Of the hive's keys.
    """
    async with AsyncExitStack() as stack:
        try:
            account = await _make(api, name, namespace, key_namespace, stack)
        except ApiRefusal:
            yield None
            return
        yield account


async def _make(api: Api, name: str, namespace: str, key_namespace: str, stack: AsyncExitStack) -> CountedAccount:
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    await _create(api, accounts, {"metadata": {"name": name}}, stack)
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    for place, where in ((Place.SANDBOXES, namespace), (Place.HIVE, key_namespace)):
        role = f"{name}-{place.name.lower()}"
        rules = [
            {"apiGroups": [right.group], "resources": [right.resource], "verbs": list(right.verbs)}
            for right in RIGHTS
            if right.place is place
        ]
        await _create(api, f"{_RBAC}/{where}/roles", {"metadata": {"name": role}, "rules": rules}, stack)
        bound = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role}
        binding = {"metadata": {"name": role}, "roleRef": bound, "subjects": [subject]}
        await _create(api, f"{_RBAC}/{where}/rolebindings", binding, stack)
    account = {"kind": "ServiceAccount", "serviceAccount": {"namespace": namespace, "name": name}}
    await _create(api, _SCHEMAS, _schema(name, account, _SPAWNS, _BEFORE_DEFAULTS), stack)
    await _create(api, _SCHEMAS, _schema(f"{name}-rest", account, ["*"], _BEFORE_DEFAULTS + 1), stack)
    token = await api.create(f"{accounts}/{name}/token", {"spec": {"expirationSeconds": _TOKEN_SECONDS}})
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ash-bench-", dir="/tmp")))
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(api.kubeconfig(str(token["status"]["token"]), namespace)), encoding="utf-8")
    counted = CountedAccount(kubeconfig, api, name)
    await _take_effect(counted, namespace)
    return counted


async def _create(api: Api, collection: str, body: Json, stack: AsyncExitStack) -> None:
    await api.create(collection, body)
    stack.push_async_callback(_remove, api, f"{collection}/{body['metadata']['name']}")


async def _remove(api: Api, path: str) -> None:
    with anyio.CancelScope(shield=True):
        await api.delete(path)


def _schema(name: str, account: Json, resources: list[str], precedence: int) -> Json:
    anywhere = {"apiGroups": ["*"], "namespaces": ["*"], "clusterScope": True}
    rule = {"subjects": [account], "resourceRules": [{"verbs": ["*"], "resources": resources, **anywhere}]}
    level = {"name": _LEVEL}
    spec = {"priorityLevelConfiguration": level, "matchingPrecedence": precedence, "rules": [rule]}
    return {"metadata": {"name": name}, "spec": spec}


async def _take_effect(account: CountedAccount, namespace: str) -> None:
    """Wait until the account has its rights and is counted.

    Raises:
        ConnectFailed: The server does not count by flow schema, as one without priority and fairness.
    """
    async with open_api(account.kubeconfig, None) as own:
        with anyio.move_on_after(_EFFECT_SECONDS):
            while True:
                with suppress(ApiRefusal):
                    for kind in ("pods", "events"):
                        await own.get(f"/api/v1/namespaces/{namespace}/{kind}", limit="1")
                    if all(await account.requests()):
                        return
                await anyio.sleep(0.2)
    raise ConnectFailed("the API server does not count requests by flow schema, or not those of a new account")
