"""Label selectors, and taints with tolerations, decided as Kubernetes decides them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["directions", "selects", "takes"]

Json = dict[str, Any]


def directions(spec: Json) -> Sequence[str]:
    """Return which of `Ingress` and `Egress` a NetworkPolicy governs."""
    return spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]


def selects(selector: Json, labels: Mapping[str, str]) -> bool:
    """Say whether a label selector selects an object with these labels; an empty one selects all."""
    wanted: Mapping[str, str] = selector.get("matchLabels") or {}
    expressions: Sequence[Json] = selector.get("matchExpressions") or ()
    return wanted.items() <= labels.items() and all(_holds(expression, labels) for expression in expressions)


def _holds(expression: Json, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None


def takes(node: Json, tolerations: Sequence[Json]) -> bool:
    """Say whether a node is ready and no taint of it keeps off a pod with these tolerations; not if it has room."""
    status: Json = node.get("status") or {}
    conditions: Sequence[Json] = status.get("conditions") or ()
    is_ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    spec: Json = node.get("spec") or {}
    taints = [taint for taint in spec.get("taints") or () if taint["effect"] in ("NoSchedule", "NoExecute")]
    return is_ready and all(any(_tolerates(each, taint) for each in tolerations) for taint in taints)


def _tolerates(toleration: Json, taint: Json) -> bool:
    return (
        toleration.get("effect") in (None, "", taint["effect"])
        and toleration.get("key") in (None, "", taint["key"])
        and (toleration.get("operator") == "Exists" or (toleration.get("value") or "") == (taint.get("value") or ""))
    )
