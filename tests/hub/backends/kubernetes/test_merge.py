"""A pod template goes over a pod as `kubectl patch` would lay it."""

from __future__ import annotations

from typing import Any

import pytest

from ash_hub.backends.kubernetes.merge import merged
from ash_mcp.errors import ConfigError


@pytest.mark.parametrize(
    ("base", "patch", "found"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": 1, "b": 2}, {"a": None, "c": None}, {"b": 2}),
        ({"a": {"x": 1}}, {"a": {"y": 2}}, {"a": {"x": 1, "y": 2}}),
        ({"a": {"x": 1}}, {"a": {"$patch": "replace", "y": 2}}, {"a": {"y": 2}}),
        ({"tolerations": [{"key": "a"}]}, {"tolerations": [{"key": "b"}]}, {"tolerations": [{"key": "b"}]}),
        (
            {"containers": [{"name": "sandbox", "image": "x", "env": [{"name": "A", "value": "1"}]}]},
            {"containers": [{"name": "sandbox", "env": [{"name": "B", "value": "2"}]}, {"name": "beside"}]},
            {
                "containers": [
                    {
                        "name": "sandbox",
                        "image": "x",
                        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                    },
                    {"name": "beside"},
                ]
            },
        ),
        (
            {"volumes": [{"name": "a"}, {"name": "b"}]},
            {"volumes": [{"name": "a", "$patch": "delete"}]},
            {"volumes": [{"name": "b"}]},
        ),
        ({}, {"volumeMounts": ({"mountPath": "/x"},)}, {"volumeMounts": [{"mountPath": "/x"}]}),
    ],
)
def test_a_patch_over_a_base(base: Any, patch: Any, found: Any) -> None:
    before = repr(base), repr(patch)
    assert merged(base, patch) == found
    assert (repr(base), repr(patch)) == before


def test_an_item_without_its_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="each item of volumes needs its name"):
        merged({"volumes": []}, {"volumes": [{"emptyDir": {}}]})
