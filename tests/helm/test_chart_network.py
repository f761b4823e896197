"""The chart's NetworkPolicies, judged as a cluster would: who may connect to whom."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any, Final

import pytest

from ash_hub.egress.addresses import kind_of
from tests.helm.chart import EVERYTHING, NAMESPACE, NOTHING, Object, names, template

SANDBOXES: Final = "ash-sandboxes"
HUB: Final = {
    "app.kubernetes.io/name": "ash",
    "app.kubernetes.io/instance": "ash",
    "app.kubernetes.io/component": "hub",
}
ROUTER: Final = {**HUB, "app.kubernetes.io/component": "router"}
REDIS: Final = {**HUB, "app.kubernetes.io/component": "redis"}
EGRESS: Final = {**HUB, "app.kubernetes.io/component": "egress"}
STRANGER: Final = {"app": "stranger"}
DNS: Final = {"k8s-app": "kube-dns"}

Labels = Mapping[str, str]


def sandbox(network: str, hive: str = "ash") -> Labels:
    return {"ash/hive": hive, "ash/sandbox": "sbx-1", "ash/network": network, "app.kubernetes.io/managed-by": "ash"}


def selects(selector: Mapping[str, Any], labels: Labels) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for it in selector.get("matchExpressions", ()):
        assert it["operator"] == "In"
        wanted = wanted and labels.get(it["key"]) in it["values"]
    return wanted


class Policies:
    """What a cluster with these policies lets through."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._policies = [it for it in template(values) if it["kind"] == "NetworkPolicy"]

    def lets_in(self, to: Labels, to_namespace: str, origin: Labels, origin_namespace: str, port: int) -> bool:
        rules = self._rules("Ingress", to, to_namespace)
        return rules is None or any(
            self._port(rule, port)
            and (
                "from" not in rule
                or any(self._peer(it, to_namespace, origin, origin_namespace) for it in rule["from"])
            )
            for rule in rules
        )

    def lets_out_to_pod(
        self, origin: Labels, to: Labels, to_namespace: str, port: int, *, namespace: str = SANDBOXES
    ) -> bool:
        rules = self._rules("Egress", origin, namespace)
        return rules is None or any(
            self._port(rule, port)
            and ("to" not in rule or any(self._peer(it, namespace, to, to_namespace) for it in rule["to"]))
            for rule in rules
        )

    def lets_out_to_address(self, origin: Labels, text: str, port: int = 443, *, namespace: str = SANDBOXES) -> bool:
        rules, address = self._rules("Egress", origin, namespace), ip_address(text)
        blocks = [
            it["ipBlock"]
            for rule in rules or ()
            for it in rule.get("to", ())
            if "ipBlock" in it and self._port(rule, port)
        ]
        return rules is None or any(
            address in ip_network(block["cidr"])
            and not any(address in ip_network(it) for it in block.get("except", ()))
            for block in blocks
            if ip_network(block["cidr"]).version == address.version
        )

    def _rules(self, direction: str, pod: Labels, namespace: str) -> list[Object] | None:
        """Return the rules for a pod; None where no policy is for it, so that everything passes."""
        mine = [
            it["spec"]
            for it in self._policies
            if it["metadata"].get("namespace", NAMESPACE) == namespace
            and direction in it["spec"]["policyTypes"]
            and selects(it["spec"]["podSelector"], pod)
        ]
        return [rule for spec in mine for rule in spec.get(direction.lower(), ())] if mine else None

    @staticmethod
    def _port(rule: Object, port: int) -> bool:
        return "ports" not in rule or any(it["port"] == port for it in rule["ports"])

    @staticmethod
    def _peer(peer: Object, own_namespace: str, labels: Labels, namespace: str) -> bool:
        if "ipBlock" in peer:
            return False
        if "namespaceSelector" in peer:
            near = selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        else:
            near = namespace == own_namespace
        return near and selects(peer["podSelector"], labels)


@pytest.fixture(scope="module")
def policies() -> Policies:
    return Policies()


@pytest.mark.parametrize("network", ["none", "internet", "domains"])
def test_only_hubs_and_routers_reach_a_sandbox(network: str, policies: Policies) -> None:
    box = sandbox(network)
    assert policies.lets_in(box, SANDBOXES, HUB, NAMESPACE, 8421)
    assert policies.lets_in(box, SANDBOXES, HUB, NAMESPACE, 3000)  # of an image that is a server by itself
    for labels, namespace in (
        (sandbox(network), SANDBOXES),
        (STRANGER, NAMESPACE),
        (REDIS, NAMESPACE),
        (DNS, "kube-system"),
    ):
        assert not policies.lets_in(box, SANDBOXES, labels, namespace, 8421), (labels, namespace)
    assert not policies.lets_in(box, SANDBOXES, HUB, "elsewhere", 8421)  # who calls itself a hub in another namespace
    assert not policies.lets_in(box, SANDBOXES, HUB, SANDBOXES, 8421)
    assert not policies.lets_in(box, SANDBOXES, ROUTER, NAMESPACE, 8421)  # there is none
    assert Policies(EVERYTHING).lets_in(box, SANDBOXES, ROUTER, NAMESPACE, 8421)


@pytest.mark.parametrize("network", ["none", "domains", "of tomorrow"])
def test_nothing_goes_out_of_a_sandbox_that_is_not_on_the_internet(network: str, policies: Policies) -> None:
    box = sandbox(network)
    for address in ("1.1.1.1", "10.0.0.1", "169.254.169.254", "2606:4700:4700::1111"):
        assert not policies.lets_out_to_address(box, address)
    for labels, namespace in ((DNS, "kube-system"), (HUB, NAMESPACE), (REDIS, NAMESPACE), (box, SANDBOXES)):
        assert not policies.lets_out_to_pod(box, labels, namespace, 53)
        assert not policies.lets_out_to_pod(box, labels, namespace, 6379)


def test_a_sandbox_on_the_internet_reaches_public_addresses_and_names(policies: Policies) -> None:
    box = sandbox("internet")
    for address in ("1.1.1.1", "93.184.216.34", "223.255.255.1", "2606:4700:4700::1111"):
        assert policies.lets_out_to_address(box, address)
    assert policies.lets_out_to_pod(box, DNS, "kube-system", 53)
    assert not policies.lets_out_to_pod(box, DNS, "kube-system", 9153)
    assert not policies.lets_out_to_pod(box, DNS, SANDBOXES, 53)  # who calls itself a DNS elsewhere
    for labels, namespace, port in ((HUB, NAMESPACE, 8420), (REDIS, NAMESPACE, 6379), (box, SANDBOXES, 8421)):
        assert not policies.lets_out_to_pod(box, labels, namespace, port)


@pytest.mark.parametrize(
    "address",
    """0.0.0.1 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 168.63.129.16 169.254.169.254 169.254.20.10 172.16.0.1
    172.31.255.255 192.0.0.192 192.168.1.1 198.18.0.1 224.0.0.1 255.255.255.255 ::1 ::ffff:10.0.0.1 64:ff9b::a00:1
    2001::1 2002:a00:1::1 fc00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fec0::1 ff02::1""".split(),
)
def test_a_sandbox_on_the_internet_reaches_no_address_that_the_egress_proxy_would_refuse(
    address: str, policies: Policies
) -> None:
    assert kind_of(ip_address(address)) is not None
    assert not policies.lets_out_to_address(sandbox("internet"), address)


def test_a_sandbox_with_a_list_of_domains_reaches_the_egress_proxies_and_nothing_else(policies: Policies) -> None:
    box = sandbox("domains")
    assert policies.lets_out_to_pod(box, EGRESS, NAMESPACE, 3128)
    for labels, namespace, port in (
        (EGRESS, NAMESPACE, 3129),  # for the kubelet
        (EGRESS, "elsewhere", 3128),
        (EGRESS, SANDBOXES, 3128),  # who calls itself a proxy
        (HUB, NAMESPACE, 8420),
        (HUB, NAMESPACE, 8423),
        (REDIS, NAMESPACE, 6379),
        (box, SANDBOXES, 8421),
    ):
        assert not policies.lets_out_to_pod(box, labels, namespace, port), (labels, namespace, port)
    for other in ("none", "internet"):
        assert not policies.lets_out_to_pod(sandbox(other), EGRESS, NAMESPACE, 3128)
    without = Policies({"egress": {"enabled": False}})
    assert not without.lets_out_to_pod(box, EGRESS, NAMESPACE, 3128)


def test_an_egress_proxy_takes_only_such_sandboxes_and_reaches_only_what_is_public(policies: Policies) -> None:
    assert policies.lets_in(EGRESS, NAMESPACE, sandbox("domains"), SANDBOXES, 3128)
    assert policies.lets_in(EGRESS, NAMESPACE, HUB, NAMESPACE, 3128)  # so that doctor sees it
    for labels, namespace, port in (
        (sandbox("none"), SANDBOXES, 3128),
        (sandbox("internet"), SANDBOXES, 3128),
        (sandbox("domains", hive="another"), SANDBOXES, 3128),
        (sandbox("domains"), "elsewhere", 3128),
        (sandbox("domains"), SANDBOXES, 3129),
        (HUB, "elsewhere", 3128),
        (STRANGER, NAMESPACE, 3128),
    ):
        assert not policies.lets_in(EGRESS, NAMESPACE, labels, namespace, port), (labels, namespace, port)
    for address in ("1.1.1.1", "2606:4700:4700::1111"):
        assert policies.lets_out_to_address(EGRESS, address, 8443, namespace=NAMESPACE)
    for address in ("10.0.0.1", "10.9.0.1", "169.254.169.254", "fc00::1"):
        assert not policies.lets_out_to_address(EGRESS, address, namespace=NAMESPACE)
    assert policies.lets_out_to_pod(EGRESS, HUB, NAMESPACE, 8423, namespace=NAMESPACE)
    assert policies.lets_out_to_pod(EGRESS, DNS, "kube-system", 53, namespace=NAMESPACE)
    for labels, port in ((HUB, 8420), (HUB, 8422), (REDIS, 6379), (ROUTER, 8420)):
        assert not policies.lets_out_to_pod(EGRESS, labels, NAMESPACE, port, namespace=NAMESPACE)
    assert not policies.lets_out_to_pod(EGRESS, sandbox("domains"), SANDBOXES, 8421, namespace=NAMESPACE)
    wider = Policies(EVERYTHING)
    assert wider.lets_out_to_address(EGRESS, "10.9.0.1", namespace=NAMESPACE)


def test_only_egress_proxies_ask_a_hub_what_a_sandbox_may_reach(policies: Policies) -> None:
    assert policies.lets_in(HUB, NAMESPACE, EGRESS, NAMESPACE, 8423)
    for labels, namespace in ((sandbox("domains"), SANDBOXES), (STRANGER, NAMESPACE), (EGRESS, "elsewhere")):
        assert not policies.lets_in(HUB, NAMESPACE, labels, namespace, 8423)


def test_ranges_of_the_cluster_can_be_added() -> None:
    from_values = Policies({"networkPolicies": {"blocked": ["34.118.224.0/20", "2600:1900::/32"]}})
    assert not from_values.lets_out_to_address(sandbox("internet"), "34.118.224.10")
    assert not from_values.lets_out_to_address(sandbox("internet"), "2600:1900::1")


def test_what_ash_did_not_create_is_not_bound(policies: Policies) -> None:
    for other in (STRANGER, sandbox("none", hive="another")):
        assert policies.lets_in(other, SANDBOXES, STRANGER, NAMESPACE, 80)
        assert policies.lets_out_to_address(other, "10.0.0.1")


def test_redis_and_the_port_between_hubs_are_for_the_hive_alone() -> None:
    policies = Policies(EVERYTHING)
    for labels, namespace in ((STRANGER, NAMESPACE), (HUB, "elsewhere"), (sandbox("internet"), SANDBOXES)):
        assert not policies.lets_in(REDIS, NAMESPACE, labels, namespace, 6379)
        assert not policies.lets_in(HUB, NAMESPACE, labels, namespace, 8422)
        assert policies.lets_in(HUB, NAMESPACE, labels, namespace, 8420)
        assert policies.lets_in(ROUTER, NAMESPACE, labels, namespace, 8420)
    for labels in (HUB, ROUTER):
        assert policies.lets_in(REDIS, NAMESPACE, labels, NAMESPACE, 6379)
        assert policies.lets_in(HUB, NAMESPACE, labels, NAMESPACE, 8422)
    assert not policies.lets_in(HUB, NAMESPACE, HUB, NAMESPACE, 9999)


def test_policies_can_be_left_out() -> None:
    assert not names(template(NOTHING), "NetworkPolicy")
