"""Why sandboxes ended, on disk, so that a hive that starts later can tell their owners."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

from ash_hub.files import replace_text
from ash_hub.sandbox import Sandbox
from ash_mcp.types import EndReason, SandboxId, State

__all__ = ["Endings"]

MOST: Final = 1000
log = logging.getLogger("ash.hub")


class Endings:
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
        if sandbox.life.reason is None or self._file(sandbox.id).exists():
            return
        life = sandbox.life
        body = {
            "state": life.state if life.state.ended else State.GONE,
            "ended_at": life.ended_at or now,
            "reason": life.reason,
            "message": life.message,
            "record": sandbox.record(),
        }
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_text(self._file(sandbox.id), json.dumps(body))
        except OSError as error:
            log.warning("why %s ended cannot be kept for the next hive: %s", sandbox.id, error)
            return
        self._kept[sandbox.id] = None
        while len(self._kept) > self._most:
            self.drop(next(iter(self._kept)))

    def drop(self, sandbox_id: SandboxId) -> None:
        self._kept.pop(sandbox_id, None)
        self._file(sandbox_id).unlink(missing_ok=True)

    def load(self, now: float) -> list[Sandbox]:
        """Return what earlier hives and other replicas kept, the first to end first; what is over its time goes."""
        found: list[Sandbox] = []
        for file in self._directory.glob("*.json"):
            sandbox = _read(file, now)
            if sandbox is None or now - (sandbox.life.ended_at or now) >= self._seconds:
                file.unlink(missing_ok=True)
            else:
                found.append(sandbox)
        found.sort(key=lambda sandbox: sandbox.life.ended_at or now)
        for sandbox in found[: -self._most]:
            self.drop(sandbox.id)
        self._kept.update(dict.fromkeys(sandbox.id for sandbox in found[-self._most :]))
        return found[-self._most :]

    def _file(self, sandbox_id: SandboxId) -> Path:
        return self._directory / f"{sandbox_id}.json"


def _read(file: Path, now: float) -> Sandbox | None:
    """Return the sandbox of a file; None if it is gone or cannot be read."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        sandbox = Sandbox.from_record(SandboxId(file.stem), body["record"])
        sandbox.life = replace(
            sandbox.life,
            state=State(body["state"]),
            ended_at=min(float(body["ended_at"]), now),  # the clock may have been set back since
            reason=EndReason(body["reason"]),
            message=body["message"],
        )
    except (OSError, KeyError, TypeError, ValueError):
        return None
    sandbox.settled.set()
    sandbox.ended.set()
    return sandbox
