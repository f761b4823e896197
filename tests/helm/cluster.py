"""A real cluster, by the kubeconfig that ASH_TEST_KUBECONFIG names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import Any, Final

import pytest

from tests.helm.chart import Object

TAG: Final = os.environ.get("ASH_TEST_IMAGE_TAG", "dev")
"""Of the images localhost/ash/hub, recipes and redis, which the nodes have."""

_SMALL: Final = {"requests": {"cpu": "10m"}, "limits": {"memory": "512Mi"}}


def kubectl(*arguments: str, objects: list[Object] | None = None) -> subprocess.CompletedProcess[str]:
    config, program = os.environ.get("ASH_TEST_KUBECONFIG"), shutil.which("kubectl")
    if not config:
        pytest.skip("ASH_TEST_KUBECONFIG names no cluster")
    if program is None:
        pytest.skip("kubectl is not installed")
    given = None if objects is None else json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    return subprocess.run(
        [program, "--kubeconfig", config, "--request-timeout", "30s", *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=90,
    )


def done(*arguments: str, objects: list[Object] | None = None) -> str:
    it = kubectl(*arguments, objects=objects)
    assert it.returncode == 0, it.stderr
    return it.stdout


def on_one_node(namespace: str) -> dict[str, Any]:
    """Return what a release needs on a cluster of one small node that has the images and no disks."""
    return {
        "image": {"repository": "localhost/ash/hub", "tag": TAG},
        "hub": {"resources": _SMALL},
        "redis": {"image": f"localhost/ash/redis:{TAG}", "persistence": {"enabled": False}, "resources": _SMALL},
        "sandboxes": {
            "namespace": f"{namespace}-sandboxes",
            "settings": {"image": f"localhost/ash/recipes:{TAG}", "cpu_request": "10m", "memory_request": "64Mi"},
        },
        "egress": {"resources": _SMALL},
    }
