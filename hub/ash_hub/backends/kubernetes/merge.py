"""The strategic merge of a pod template over a pod, by the rules of `kubectl patch`. Pure.

Objects merge key by key and null removes a key. A list is replaced, unless Kubernetes knows its items by a key: then
items with the same key merge, others are added, and `$patch: delete` in an item removes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from ash_mcp.errors import ConfigError

__all__ = ["merged"]

_KEYS: Final[Mapping[str, str]] = {
    "containers": "name",
    "ephemeralContainers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "ownerReferences": "uid",
}
"""The merge keys of a pod's lists: `x-kubernetes-patch-merge-key` in the API's description of them."""


def merged(base: Any, patch: Any, field: str = "") -> Any:
    """Return `base` with `patch` over it; neither is changed.

    Raises:
        ConfigError: An item of a list lacks the key that it is known by.
    """
    if isinstance(patch, Mapping):
        given = cast("Mapping[str, Any]", patch)
        below = cast("dict[str, Any]", base) if isinstance(base, dict) else dict[str, Any]()
        if given.get("$patch") == "replace":
            return {name: value for name, value in given.items() if name != "$patch"}
        found = dict(below)
        for name, value in given.items():
            if value is None:
                found.pop(name, None)
            else:
                found[name] = merged(below.get(name), value, name)
        return found
    if isinstance(patch, list | tuple) and field in _KEYS:
        items = cast("list[Any]", base) if isinstance(base, list) else list[Any]()
        return _merged_items(items, cast("Sequence[Any]", patch), field)
    return cast("Any", patch)


def _merged_items(base: list[Any], patch: Sequence[Any], field: str) -> list[Any]:
    key = _KEYS[field]
    found = {item[key]: item for item in base}
    for item in patch:
        if not isinstance(item, Mapping) or key not in item:
            raise ConfigError(f"pod_template: each item of {field} needs its {key}")
        change = cast("Mapping[str, Any]", item)
        if change.get("$patch") == "delete":
            found.pop(change[key], None)
        else:
            found[change[key]] = merged(found.get(change[key]), change)
    return list(found.values())
