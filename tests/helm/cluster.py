"""A real cluster, by the kubeconfig that ASH_TEST_KUBECONFIG names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from tests.helm.chart import Object


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
