"""A real cluster, by the kubeconfig that ASH_TEST_KUBECONFIG names, and a namespace of its own there for each test."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio
import pytest

from ash_hub.backends.kubernetes.api import Api, open_api

NAMESPACES: Final = "/api/v1/namespaces"
RUNTIMES: Final = [pytest.param(None, id="runc"), pytest.param("gvisor", id="gvisor")]
"""Runtime classes of sandboxes; None is the cluster's default runtime, which is to be runc."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """An API server and a namespace in which a test is alone."""

    api: Api
    namespace: str


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def cluster() -> AsyncGenerator[Cluster]:
    async with opened() as made:
        yield made


@asynccontextmanager
async def opened() -> AsyncGenerator[Cluster]:
    """Enter the cluster and a new namespace, which is deleted at the end. Skips where there is no cluster."""
    kubeconfig = os.environ.get("ASH_TEST_KUBECONFIG")
    if not kubeconfig:
        pytest.skip("ASH_TEST_KUBECONFIG names no kubeconfig of a cluster for tests")
    namespace = f"ash-test-{secrets.token_hex(4)}"
    async with open_api(Path(kubeconfig), None) as api:
        await api.create(NAMESPACES, {"metadata": {"name": namespace}})
        try:
            with anyio.fail_after(20):  # no pod is admitted before its account exists
                while await api.get(f"{NAMESPACES}/{namespace}/serviceaccounts/default") is None:
                    await anyio.sleep(0.05)
            yield Cluster(api, namespace)
        finally:
            with anyio.CancelScope(shield=True):
                await api.delete(f"{NAMESPACES}/{namespace}")


async def require_class(api: Api, runtime_class: str | None) -> None:
    """Skip where the cluster has no such runtime class."""
    if runtime_class is not None and await api.get(f"/apis/node.k8s.io/v1/runtimeclasses/{runtime_class}") is None:
        pytest.skip(f"the cluster has no runtime class {runtime_class}")
