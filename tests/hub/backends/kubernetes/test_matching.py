"""What selectors select and nodes take, as Kubernetes documents it."""

from __future__ import annotations

from typing import Any

import pytest

from ash_hub.backends.kubernetes.matching import directions, selects, takes

LABELS = {"ash/hive": "h", "ash/network": "none"}


@pytest.mark.parametrize(
    ("selector", "is_selected"),
    [
        ({}, True),
        ({"matchLabels": {"ash/hive": "h"}}, True),
        ({"matchLabels": {"ash/hive": "h", "app": "x"}}, False),
        ({"matchLabels": {"ash/hive": "other"}}, False),
        ({"matchExpressions": [{"key": "ash/network", "operator": "In", "values": ["none", "internet"]}]}, True),
        ({"matchExpressions": [{"key": "ash/network", "operator": "In", "values": ["internet"]}]}, False),
        ({"matchExpressions": [{"key": "ash/network", "operator": "NotIn", "values": ["none"]}]}, False),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["none"]}]}, True),
        ({"matchExpressions": [{"key": "ash/hive", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, True),
        ({"matchExpressions": [{"key": "ash/hive", "operator": "DoesNotExist"}]}, False),
        ({"matchLabels": {"ash/hive": "h"}, "matchExpressions": [{"key": "app", "operator": "Exists"}]}, False),
    ],
    ids=str,
)
def test_a_selector_selects_by_all_that_it_says(selector: dict[str, Any], is_selected: bool) -> None:
    assert selects(selector, LABELS) is is_selected


@pytest.mark.parametrize(
    ("spec", "governed"),
    [
        ({}, ["Ingress"]),
        ({"egress": [{"ports": [{"port": 53}]}]}, ["Ingress", "Egress"]),
        ({"policyTypes": ["Egress"]}, ["Egress"]),
    ],
    ids=str,
)
def test_a_policy_governs_what_comes_in_unless_it_says_otherwise(spec: dict[str, Any], governed: list[str]) -> None:
    assert list(directions(spec)) == governed


def node(*taints: dict[str, str], ready: str = "True") -> dict[str, Any]:
    return {"spec": {"taints": list(taints)}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}


TAINT = {"key": "role", "value": "gpu", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("which", "tolerations", "is_taken"),
    [
        (node(), [], True),
        (node(ready="Unknown"), [], False),
        (node(TAINT), [], False),
        (node(TAINT | {"effect": "PreferNoSchedule"}), [], True),
        (node(TAINT), [{"operator": "Exists"}], True),
        (node(TAINT), [{"key": "role", "operator": "Exists"}], True),
        (node(TAINT), [{"key": "role", "value": "gpu", "effect": "NoSchedule"}], True),
        (node(TAINT), [{"key": "role", "value": "cpu"}], False),
        (node(TAINT), [{"key": "role", "operator": "Exists", "effect": "NoExecute"}], False),
        (node(TAINT, TAINT | {"key": "other"}), [{"key": "role", "operator": "Exists"}], False),
    ],
)
def test_a_node_takes_a_pod_that_tolerates_all_that_keeps_pods_off(
    which: dict[str, Any], tolerations: list[dict[str, Any]], is_taken: bool
) -> None:
    assert takes(which, tolerations) is is_taken
