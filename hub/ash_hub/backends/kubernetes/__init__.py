"""Sandboxes on a Kubernetes cluster: one plain pod each, dialled by its address.

backend.py    the Backend of a cluster
settings.py   its settings
pods.py       the pod of a sandbox, and what its status means; merge.py: a pod template over it
image_server.py  what differs for an image that is a server by itself; variables.py: the Secrets of its variables
egress.py     how sandboxes get to the egress proxies, and what these are told
informer.py   one collection of the API server, followed
documents.py  the hive's documents, in ConfigMaps and Secrets
probe.py      what `ash doctor` says of a cluster; rights.py: what a hive's account needs there; matching.py: what
              selectors and tolerations mean
api.py        the API server, as JSON
"""

from collections.abc import Mapping
from typing import Any

from ash_hub.backends.base import Backend, Places
from ash_hub.backends.checks import Check
from ash_hub.backends.kubernetes.settings import KubernetesSettings

__all__ = ["KubernetesSettings", "build", "check"]


def build(options: Mapping[str, Any], places: Places) -> Backend:
    """Make the backend from a hive's settings."""
    from ash_hub.backends.kubernetes.backend import KubernetesBackend  # its library is an extra of the package

    del places  # sandboxes and documents are the cluster's
    return KubernetesBackend(KubernetesSettings.model_validate(options))


async def check(settings: KubernetesSettings) -> list[Check]:
    """Look at the cluster of a hive's settings, for `ash doctor`."""
    from ash_hub.backends.kubernetes.probe import probe

    return await probe(settings)
