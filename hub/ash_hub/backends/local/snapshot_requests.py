"""The local backend's requests to the keeper about snapshots, and what its refusals mean."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Final, NoReturn

from ash_hub.backends.base import Snapshot, SnapshotOrder
from ash_hub.backends.local.link import KeeperConnectionLost, KeeperLink, KeeperRefusal, KeeperSilent
from ash_mcp.errors import (
    CapacityExceeded,
    Conflict,
    ConnectFailed,
    SnapshotNotFound,
    StartFailed,
    Unsupported,
)
from ash_mcp.types import SandboxId, SnapshotId

__all__ = ["SnapshotRequests", "unknown_snapshot"]

_QUICK_SECONDS: Final = 10.0
_COPY_SECONDS: Final = 60.0


class SnapshotRequests:
    """Asks the keeper.

    Args:
        link: Returns the connection to it.
        seconds: What ending a sandbox and starting it anew may take.
    """

    def __init__(self, link: Callable[[], Awaitable[KeeperLink]], seconds: float) -> None:
        self._link = link
        self._seconds = seconds

    async def freeze(self, sandbox_id: SandboxId, order: SnapshotOrder) -> Snapshot:
        answer = await self._ask(
            "freeze",
            self._seconds + (_COPY_SECONDS if order.live else 0.0),
            id=sandbox_id,
            snapshot=order.id,
            owner=order.owner,
            limits=asdict(order.limits),
            record=dict(order.record),
            for_seconds=order.seconds,
            live=order.live,
        )
        return _snapshot(answer["snapshot"])

    async def reset(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> None:
        await self._ask("reset", self._seconds, id=sandbox_id, snapshot=snapshot_id)

    async def list(self) -> list[Snapshot]:
        answer = await self._ask("snapshots", _QUICK_SECONDS)
        return [_snapshot(view) for view in answer["snapshots"]]

    async def drop(self, snapshot_id: SnapshotId) -> None:
        await self._ask("drop", _QUICK_SECONDS, snapshot=snapshot_id)

    async def _ask(self, operation: str, bound: float, **fields: Any) -> Mapping[str, Any]:
        try:
            link = await self._link()
            return await link.request(operation, seconds=bound, **fields)
        except KeeperRefusal as refusal:
            _raise(refusal, str(fields.get("snapshot", "")))
        except (KeeperConnectionLost, KeeperSilent) as away:
            raise ConnectFailed(f"snapshots cannot be used now: {away or 'the keeper was lost'}") from away


def unknown_snapshot(name: str) -> SnapshotNotFound:
    return SnapshotNotFound(f"you have no snapshot {name!r}, or no longer; list yours", snapshot=name)


def _raise(refusal: KeeperRefusal, name: str) -> NoReturn:
    kind, said = refusal.kind, str(refusal)
    if kind == "no_snapshot":
        raise unknown_snapshot(name) from refusal
    if kind in ("full", "too_deep"):
        raise CapacityExceeded(f"no snapshot was taken: {said}", retryable=False) from refusal
    if kind in ("changed", "busy", "exists", "stopped", "other_image"):
        raise Conflict(said) from refusal
    if kind == "no_snapshots":
        raise Unsupported(f"this sandbox has no snapshots: {said}; spawn another one") from refusal
    if kind == "restart":
        raise StartFailed(said, step="restart") from refusal
    if kind == "copy":
        raise Conflict(f"no snapshot was taken: {said}; take one that is not live") from refusal
    raise ConnectFailed(f"snapshots cannot be used now: {said}") from refusal


def _snapshot(view: Mapping[str, Any]) -> Snapshot:
    return Snapshot(
        id=SnapshotId(view["id"]),
        owner=view["owner"],
        size=view["bytes"],
        layers=view["layers"],
        left_seconds=view["left_seconds"],
        record=view["record"],
    )
