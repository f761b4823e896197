"""The chart before a real API server: it takes every object, and each account may do what it must and no more."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Final

import pytest

from tests.helm.chart import EVERYTHING, TABLE, Object, template
from tests.helm.cluster import done, kubectl

pytestmark = pytest.mark.kubernetes

RELEASE: Final = "ash"
EXTENSIONS: Final = {"HTTPRoute", "ServiceMonitor"}
"""Kinds that a cluster has only once somebody installed them."""


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace for the release, beside one for its sandboxes; both go at the end."""
    name = f"chart-{secrets.token_hex(4)}"
    done("create", "namespace", name)
    done("create", "namespace", f"{name}-sandboxes")
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, f"{name}-sandboxes", "--wait=false")


def rendered(values: Mapping[str, Any], namespace: str) -> list[Object]:
    """Return the objects of a release in that namespace; each names the namespace that helm would put it into."""
    sandboxes: dict[str, Any] = {"namespace": f"{namespace}-sandboxes", **values.get("sandboxes", {})}
    if not sandboxes.get("createNamespace", True):
        sandboxes["namespace"] = namespace
    found = template({**values, "sandboxes": sandboxes}, release=RELEASE, namespace=namespace)
    clusters = {"Namespace", "ClusterRole", "ClusterRoleBinding", "RuntimeClass"}
    for it in found:
        if it["kind"] not in clusters:
            it["metadata"].setdefault("namespace", namespace)
    return found


@pytest.mark.parametrize("values", TABLE.values(), ids=TABLE.keys())
def test_an_api_server_takes_every_object(values: Mapping[str, Any], namespace: str) -> None:
    known = [it for it in rendered(values, namespace) if it["kind"] not in EXTENSIONS]
    taken = done("apply", "--dry-run=server", "--validate=strict", "--filename", "-", objects=known)
    assert len(taken.splitlines()) == len(known), taken


@pytest.fixture(scope="module")
def accounts(namespace: str) -> Iterator[str]:
    """The namespace of a release of which only accounts and roles are there."""
    kinds = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    made = [it for it in rendered(EVERYTHING, namespace) if it["kind"] in kinds]
    done("apply", "--filename", "-", objects=made)
    try:
        yield namespace
    finally:
        kubectl("delete", "--ignore-not-found", "--filename", "-", objects=made)


def granted(account: str, namespace: str, where: str) -> set[tuple[str, str]]:
    """Return resource and verb of what an account of the release may do in a namespace, and not any account."""
    return listed(f"{RELEASE}-{account}", namespace, where) - listed("default", namespace, where)


def listed(account: str, namespace: str, where: str) -> set[tuple[str, str]]:
    table = done(
        *("auth", "can-i", "--list", "--no-headers", "--namespace", where),
        *("--as", f"system:serviceaccount:{namespace}:{account}"),
    )
    found: set[tuple[str, str]] = set()
    for line in table.splitlines():
        if not line.startswith(" "):  # URLs
            found |= {(line.split()[0], verb) for verb in line[line.rindex("[") + 1 : line.rindex("]")].split()}
    return found


def pairs(table: Mapping[str, str]) -> set[tuple[str, str]]:
    return {(resource, verb) for resource, verbs in table.items() for verb in verbs.split()}


CLUSTER: Final = {"runtimeclasses.node.k8s.io": "get list"}
IN_SANDBOXES: Final = {
    "pods": "get list watch create patch delete",
    "pods/log": "get",
    "events": "list watch",
    "configmaps": "get list create patch delete",
    "secrets": "list create patch delete",
}


def test_each_account_may_do_what_it_must_and_no_more(accounts: str) -> None:
    sandboxes = f"{accounts}-sandboxes"
    assert granted("hub", accounts, sandboxes) == pairs({**CLUSTER, **IN_SANDBOXES})
    assert granted("hub", accounts, accounts) == pairs({**CLUSTER, "secrets": "get list watch create patch delete"})
    assert granted("hub", accounts, "kube-system") == pairs(CLUSTER)
    assert granted("router", accounts, accounts) == pairs({"secrets": "get list watch"})
    assert not granted("router", accounts, sandboxes)
    assert granted("uninstall", accounts, accounts) == pairs({"deployments.apps/scale": "patch", "pods": "list"})
    assert granted("uninstall", accounts, sandboxes) == pairs({"pods": "list delete"})


@pytest.mark.parametrize(
    ("verb", "resource", "where"),
    [
        ("create", "pods/exec", "-sandboxes"),
        ("create", "pods", ""),
        ("deletecollection", "pods", "-sandboxes"),
        ("update", "pods", "-sandboxes"),
        ("get", "secrets", "-sandboxes"),
        ("update", "secrets", ""),
        ("create", "serviceaccounts/token", ""),
        ("create", "rolebindings.rbac.authorization.k8s.io", "-sandboxes"),
        ("patch", "deployments.apps", ""),
        ("get", "nodes", ""),
        ("list", "namespaces", ""),
    ],
)
def test_the_hub_is_refused(verb: str, resource: str, where: str, accounts: str) -> None:
    kind, _, subresource = resource.partition("/")  # which kubectl would take for a name
    asked = kubectl(
        *("auth", "can-i", verb, kind, "--subresource", subresource, "--namespace", f"{accounts}{where}"),
        *("--as", f"system:serviceaccount:{accounts}:{RELEASE}-hub"),
    )
    assert asked.stdout.strip() == "no", asked.stdout + asked.stderr
