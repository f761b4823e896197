"""The variables of spawns for images without a runner: a Secret each, made before the pod and owned by it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import anyio

from ash_hub.backends.kubernetes.api import METADATA, METADATA_LIST, Api, ApiRefusal, Json
from ash_hub.backends.kubernetes.image_server import EXPIRES, owner_patch, variables_secret
from ash_hub.backends.kubernetes.pods import sandbox_labels, selector
from ash_mcp.errors import AshError, CapacityExceeded, ConfigError, ConnectFailed, StartFailed
from ash_mcp.types import SandboxId, SandboxSpec

__all__ = ["VariableSecrets"]

GOOD_SECONDS: Final = 600.0
"""How long a Secret waits for its pod, by the clocks of the nodes: longer than any creation takes."""
REAP_SECONDS: Final = 300.0
_CLEAN_UP_SECONDS: Final = 10.0
_log = logging.getLogger("ash.hub")


class VariableSecrets:
    """The Secrets of one hive's sandboxes.

    Args:
        namespace: Of the sandboxes.
        uid_of: The uid of a sandbox's pod, as far as the watch has told; None: there is none.
    """

    def __init__(
        self,
        api: Api,
        *,
        hive: str,
        namespace: str,
        uid_of: Callable[[SandboxId], str | None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._hive = hive
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._path = f"/api/v1/namespaces/{namespace}/secrets"
        self._uid_of = uid_of
        self._now = now

    @asynccontextmanager
    async def kept_for(self, spec: SandboxSpec) -> AsyncGenerator[str | None]:
        """Keep the variables of a sandbox, if it has any, for the body to make its pod.

        Yields:
            The uid of their Secret, which is deleted again if the body fails.

        Raises:
            ConfigError, CapacityExceeded, StartFailed: The Secret could not be made.
        """
        if not spec.variables:
            yield None
            return
        uid = None
        try:
            uid = await self._make(spec)
            yield uid
        except BaseException as error:
            if uid is None and isinstance(error.__cause__, ApiRefusal):
                raise  # none was made, and one of that name is somebody else's
            with anyio.move_on_after(_CLEAN_UP_SECONDS, shield=True):
                await self.drop(spec.id, uid)
            raise

    async def _make(self, spec: SandboxSpec) -> str:
        made = variables_secret(spec, sandbox_labels(self._hive, spec.id), self._now() + GOOD_SECONDS)
        try:
            return str((await self._api.create(self._path, made))["metadata"]["uid"])
        except ApiRefusal as refusal:
            if "exceeded quota" in refusal.message or refusal.reason == "Conflict":
                raise CapacityExceeded(f"the namespace's quota is used up: {refusal.message}") from refusal
            raise ConfigError(
                "env and secrets go to an image without a runner by a Secret, which the cluster refuses "
                f"({refusal.reason or refusal.status}): {refusal.message}"
            ) from refusal
        except ConnectFailed as error:
            said = f"the sandbox could not start: {error.message}"
            raise StartFailed(said, step="secret", retryable=True) from error

    async def give(self, sandbox_id: SandboxId, secret_uid: str, pod_uid: str) -> None:
        """Have a pod own its Secret. What fails is done by `reap`."""
        try:
            owned = owner_patch(secret_uid, sandbox_id, pod_uid)
            await self._api.patch(f"{self._path}/{sandbox_id}", owned, accept=METADATA)
        except (ApiRefusal, AshError) as error:
            _log.info("the variables of %s are not their pod's yet: %s", sandbox_id, error)

    async def drop(self, sandbox_id: SandboxId, uid: str | None = None) -> None:
        """Delete the Secret of a sandbox that has no pod. What fails is done by `reap`."""
        with suppress(ApiRefusal, AshError):
            await self._api.delete(f"{self._path}/{sandbox_id}", uid=uid)

    async def run(self) -> None:
        """Reap from time to time, until cancelled."""
        while True:
            try:
                await self.reap()
            except (ApiRefusal, AshError) as error:
                _log.debug("Secrets of sandboxes are not looked through: %s", error)
            except Exception:  # this task must not take the others with it
                _log.exception("Secrets of sandboxes could not be looked through")
            await asyncio.sleep(REAP_SECONDS)

    async def reap(self) -> None:
        """Give the Secrets that no pod owns to their pods, and delete those whose pod has not come in time.

        Raises:
            ApiRefusal, ConnectFailed: They cannot be listed, or looked after, now.
        """
        found = await self._api.get(self._path, accept=METADATA_LIST, labelSelector=selector(self._hive))
        items: list[Json] = (found or {}).get("items") or []
        for about in (each["metadata"] for each in items):
            if about.get("ownerReferences"):
                continue
            sandbox_id, uid = SandboxId(str(about["name"])), str(about["uid"])
            if (pod_uid := self._uid_of(sandbox_id)) is not None:
                await self.give(sandbox_id, uid, pod_uid)
            elif _expiry(about) <= self._now() and await self._api.get(f"{self._pods}/{sandbox_id}") is None:
                await self._api.delete(f"{self._path}/{sandbox_id}", uid=uid)


def _expiry(about: Any) -> float:
    try:
        return float(about["annotations"][EXPIRES])
    except (KeyError, ValueError):
        return float("inf")  # not as we make them
