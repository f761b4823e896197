"""Sandboxes on a Kubernetes cluster: one plain pod each, dialled by its address.

backend.py    the Backend of a cluster
settings.py   its settings
pods.py       the pod of a sandbox, and what its status means; merge.py: a pod template over it
informer.py   one collection of the API server, followed
documents.py  the hive's documents, in ConfigMaps and Secrets
api.py        the API server, as JSON
documents.py  the hive's documents, as ConfigMaps and Secrets
"""

from collections.abc import Mapping
from typing import Any

from ash_hub.backends.base import Backend, Places
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_mcp.errors import ConfigError

__all__ = ["KubernetesSettings", "build"]


def build(options: Mapping[str, Any], places: Places) -> Backend:
    """Make the backend from a hive's settings.

    Raises:
        ConfigError: Its library is not installed.
    """
    del places  # sandboxes and documents are the cluster's
    settings = KubernetesSettings.model_validate(options)
    try:
        from ash_hub.backends.kubernetes.backend import KubernetesBackend
    except ModuleNotFoundError as error:
        if error.name not in ("kubernetes_asyncio", "aiohttp"):
            raise
        raise ConfigError("the kubernetes backend needs a library: pip install 'ash-mcp[kubernetes]'") from error
    return KubernetesBackend(settings)
