"""The end of a hive's sandboxes before its release is uninstalled: first no hub any more, then no sandbox.

Runs in a pod, on the standard library alone. Its environment: RELEASE_NAMESPACE, HUB_DEPLOYMENT, HUB_PODS (a label
selector), SANDBOX_NAMESPACE, SANDBOX_PODS (another one), and TIMEOUT_SECONDS for all of it.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
LOOK_SECONDS = 1.0

Ask = Callable[[str, str, Any], Any]
"""Method, path, body; the answer, or None where there is no such thing."""


def end(ask: Ask, environ: Mapping[str, str], *, look_seconds: float = LOOK_SECONDS) -> int:
    """Scale the hub to nothing, then delete sandboxes until none is left; return how many were deleted.

    Raises:
        TimeoutError: Hubs or sandboxes were still there at the end of the time.
    """
    deadline = time.monotonic() + float(environ["TIMEOUT_SECONDS"])
    deployment = f"/apis/apps/v1/namespaces/{environ['RELEASE_NAMESPACE']}/deployments/{environ['HUB_DEPLOYMENT']}"
    ask("PATCH", f"{deployment}/scale", {"spec": {"replicas": 0}})
    while _pods(ask, environ["RELEASE_NAMESPACE"], environ["HUB_PODS"]):  # a hub that still stops could make another
        _wait(deadline, look_seconds, "hubs")
    deleted = 0
    while pods := _pods(ask, environ["SANDBOX_NAMESPACE"], environ["SANDBOX_PODS"]):
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                path = f"/api/v1/namespaces/{environ['SANDBOX_NAMESPACE']}/pods/{pod['metadata']['name']}"
                deleted += ask("DELETE", path, None) is not None
        _wait(deadline, look_seconds, "sandboxes")
    return deleted


def _pods(ask: Ask, namespace: str, selector: str) -> list[Any]:
    found = ask("GET", f"/api/v1/namespaces/{namespace}/pods?labelSelector={urllib.parse.quote(selector)}", None)
    return [] if found is None else found["items"]


def _wait(deadline: float, seconds: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"there are still {what}")
    time.sleep(seconds)


def in_cluster(environ: Mapping[str, str], account: Path = ACCOUNT) -> Ask:
    """Return what asks the API server of the cluster that this pod is in, as its service account."""
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ["KUBERNETES_SERVICE_PORT"]
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    trust = ssl.create_default_context(cafile=str(account / "ca.crt"))

    def ask(method: str, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "authorization": f"Bearer {(account / 'token').read_text()}",
                "content-type": "application/merge-patch+json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=10, context=trust) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    return ask


if __name__ == "__main__":
    try:
        count = end(in_cluster(os.environ), os.environ)
    except (OSError, TimeoutError) as error:
        sys.exit(
            f"the hive's sandboxes could not be ended: {error}. Uninstall again, or leave them with "
            "`helm uninstall --no-hooks` and delete them by their label ash/hive"
        )
    sys.stdout.write(f"ended {count} sandboxes\n")
