"""Reasons why sandboxes ended, for a hive that starts later: in the store, or on disk where a hive is one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ash_hub.lifecycle.record import Record, UnreadableRecord
from ash_hub.lifecycle.sandbox import Sandbox
from ash_hub.system.files import replace_text
from ash_mcp.errors import AshError
from ash_mcp.types import Cause, EndReason, SandboxId
from ash_router.store.base import Shelf, Store

__all__ = ["Endings", "FileEndings"]

MOST: Final = 1000
MOST_BYTES: Final = 8 * 1024 * 1024
log = logging.getLogger("ash.hub")


class Endings:
    """Ended sandboxes, for a time and up to a number: what every replica and the next hive may learn.

    Args:
        seconds: How long one is kept.
        files: Where they are kept instead of in the store: a store of this process alone ends with it.
    """

    def __init__(self, store: Store, seconds: float, files: FileEndings | None = None) -> None:
        self._store = store
        self._files = files
        self._shelf = Shelf("ended", MOST, MOST_BYTES, seconds)

    async def keep(self, sandbox: Sandbox, now: float) -> None:
        """Write down why a sandbox ended or is about to; what was written first, by any replica, stays."""
        if sandbox.reason is None:
            return
        if self._files is not None:
            self._files.keep(sandbox, now)
            return
        try:
            await self._store.keep(self._shelf, sandbox.id, json.dumps(_written(sandbox, now)))
        except AshError as error:
            log.warning("why %s ended cannot be kept for other replicas: %s", sandbox.id, error)

    async def find(self, sandbox_id: SandboxId, now: float) -> Sandbox | None:
        """Return a sandbox as the replica that ended it has kept it; None if it has not, or the store is away."""
        if self._files is not None:
            return self._files.find(sandbox_id, now)
        with suppress(AshError):
            if (text := (await self._store.kept(self._shelf, sandbox_id)).get(sandbox_id)) is not None:
                return _read(sandbox_id, text, now)
        return None

    async def load(self, now: float) -> list[Sandbox]:
        """Return what earlier hives and other replicas kept, the first to end first."""
        if self._files is not None:
            return self._files.load(now)
        try:
            kept = await self._store.kept(self._shelf)
        except AshError as error:
            log.warning("why sandboxes ended before cannot be learned: %s", error)
            return []
        read = (_read(SandboxId(name), text, now) for name, text in kept.items())
        return _in_order([sandbox for sandbox in read if sandbox is not None], now)

    def drop(self, sandbox_id: SandboxId) -> None:
        """Forget one whose time is over; the store does so by itself."""
        if self._files is not None:
            self._files.drop(sandbox_id)


class FileEndings:
    """Ended sandboxes, each in a file of its own, for a time and up to a number. Replicas may share the directory.

    Args:
        seconds: How long one is kept.
        most: How many this process keeps; of more, the last to end.
    """

    def __init__(self, directory: Path, seconds: float, most: int = MOST) -> None:
        self._directory = directory
        self._seconds = seconds
        self._most = most
        self._kept: dict[SandboxId, None] = {}
        """The first to end first."""

    def keep(self, sandbox: Sandbox, now: float) -> None:
        """Write down why a sandbox ended or is about to; what was written first, by any replica, stays."""
        if sandbox.reason is None or self._file(sandbox.id).exists():
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_text(self._file(sandbox.id), json.dumps(_written(sandbox, now)))
        except OSError as error:
            log.warning("why %s ended cannot be kept for the next hive: %s", sandbox.id, error)
            return
        self._kept[sandbox.id] = None
        while len(self._kept) > self._most:
            self.drop(next(iter(self._kept)))

    def drop(self, sandbox_id: SandboxId) -> None:
        self._kept.pop(sandbox_id, None)
        self._file(sandbox_id).unlink(missing_ok=True)

    def find(self, sandbox_id: SandboxId, now: float) -> Sandbox | None:
        return _read_file(self._file(sandbox_id), now)

    def load(self, now: float) -> list[Sandbox]:
        """Return what earlier hives and other replicas kept, the first to end first; what is over its time goes."""
        found: list[Sandbox] = []
        for file in self._directory.glob("*.json"):
            sandbox = _read_file(file, now)
            if sandbox is None or now - (sandbox.ended_at or now) >= self._seconds:
                file.unlink(missing_ok=True)
            else:
                found.append(sandbox)
        found = _in_order(found, now)
        for sandbox in found[: -self._most]:
            self.drop(sandbox.id)
        self._kept.update(dict.fromkeys(sandbox.id for sandbox in found[-self._most :]))
        return found[-self._most :]

    def _file(self, sandbox_id: SandboxId) -> Path:
        return self._directory / f"{sandbox_id}.json"


def _written(sandbox: Sandbox, now: float) -> dict[str, Any]:
    return {
        "ended_at": sandbox.ended_at or now,
        "reason": sandbox.reason,
        "cause": sandbox.cause,
        "message": sandbox.message,
        "record": sandbox.record.to_json(),
    }


def _in_order(found: Iterable[Sandbox], now: float) -> list[Sandbox]:
    return sorted(found, key=lambda sandbox: sandbox.ended_at or now)


def _read_file(file: Path, now: float) -> Sandbox | None:
    try:
        return _read(SandboxId(file.stem), file.read_text(encoding="utf-8"), now)
    except (OSError, ValueError):
        return None


def _read(sandbox_id: SandboxId, text: str, now: float) -> Sandbox | None:
    """Return a sandbox as it was written; None if it cannot be read."""
    try:
        body = json.loads(text)
        sandbox = Sandbox(id=sandbox_id, record=Record.from_json(body["record"]))
        ended_at = min(float(body["ended_at"]), now)  # the clock may have been set back since
        sandbox.bury(EndReason(body["reason"]), body["message"], ended_at, Cause(body["cause"]))
    except (KeyError, TypeError, ValueError, UnreadableRecord):
        return None
    return sandbox
