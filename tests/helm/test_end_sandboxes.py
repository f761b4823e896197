"""The script that ends a hive's sandboxes before its release is uninstalled, against an API server of a few lines."""

from __future__ import annotations

import importlib.util
import urllib.parse
from typing import Any, Final

import pytest

from tests.helm.chart import CHART

ENVIRONMENT: Final = {
    "RELEASE_NAMESPACE": "hives",
    "HUB_DEPLOYMENT": "ash-hub",
    "HUB_PODS": "component=hub",
    "SANDBOX_NAMESPACE": "boxes",
    "SANDBOX_PODS": "ash/hive=ash",
    "TIMEOUT_SECONDS": "5",
}


def script() -> Any:
    spec = importlib.util.spec_from_file_location("end_sandboxes", CHART / "files/end_sandboxes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Api:
    """Pods by namespace and selector; a hub that stops makes one more sandbox, and a deleted pod stays for a look."""

    def __init__(self, sandboxes: int) -> None:
        self.hubs = 0
        self.leaving: dict[str, bool] = {f"sbx-{number}": False for number in range(sandboxes)}
        self.asked: list[str] = []

    def __call__(self, method: str, path: str, body: Any) -> Any:
        self.asked.append(f"{method} {path}")
        parts = urllib.parse.urlsplit(path)
        selector = urllib.parse.parse_qs(parts.query).get("labelSelector", [""])[0]
        match method, parts.path, selector:
            case "PATCH", "/apis/apps/v1/namespaces/hives/deployments/ash-hub/scale", _:
                assert body == {"spec": {"replicas": 0}}
                self.hubs = 2
                return {}
            case "GET", "/api/v1/namespaces/hives/pods", "component=hub":
                self.hubs -= 1
                if self.hubs:
                    self.leaving["sbx-late"] = False
                return {"items": [{"metadata": {"name": "hub"}}] * self.hubs}
            case "GET", "/api/v1/namespaces/boxes/pods", "ash/hive=ash":
                items = [
                    {"metadata": {"name": name, **({"deletionTimestamp": "now"} if leaves else {})}}
                    for name, leaves in self.leaving.items()
                ]
                self.leaving = {name: leaves for name, leaves in self.leaving.items() if not leaves}
                return {"items": items}
            case "DELETE", _, _:
                name = parts.path.removeprefix("/api/v1/namespaces/boxes/pods/")
                if name not in self.leaving:
                    return None
                self.leaving[name] = True
                return {}
            case _:
                raise AssertionError(self.asked[-1])


def test_hubs_stop_before_sandboxes_end_and_none_is_left() -> None:
    api = Api(3)
    assert script().end(api, ENVIRONMENT, look_seconds=0) == 4
    assert not api.leaving
    first_deleted = next(number for number, asked in enumerate(api.asked) if asked.startswith("DELETE"))
    last_hub = max(number for number, asked in enumerate(api.asked) if "component" in asked)
    assert api.asked[0].startswith("PATCH") and last_hub < first_deleted
    assert sum(asked.startswith("DELETE") for asked in api.asked) == 4  # no pod is deleted twice


def test_a_namespace_that_is_gone_holds_no_sandboxes() -> None:
    def nothing(method: str, path: str, body: Any) -> Any:
        return None

    assert script().end(nothing, ENVIRONMENT, look_seconds=0) == 0


def test_sandboxes_that_do_not_go_are_told_at_the_end_of_the_time() -> None:
    def stuck(method: str, path: str, body: Any) -> Any:
        held = {"metadata": {"name": "sbx-1", "deletionTimestamp": "now"}}
        return {"items": [held] if "boxes" in path else []}

    with pytest.raises(TimeoutError, match="sandboxes"):
        script().end(stuck, {**ENVIRONMENT, "TIMEOUT_SECONDS": "0.05"}, look_seconds=0.01)
