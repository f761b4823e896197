"""The Launcher Protocol: one verb that starts a plan, and the handle on what it started.

A launcher is *not* a keeper: it makes no sockets or control groups, keeps no log, has no time limits, and ends nothing
unasked. `bubblewrap.py` and `unsafe.py` pass the same tests (`tests/hub/backends/local/test_launchers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .plan import Plan

__all__ = ["ExitStatus", "Handle", "LaunchError", "LaunchPutOff", "Launcher"]


class LaunchError(Exception):
    """A step of a launch failed; the message is for a person."""

    def __init__(self, step: str, message: str) -> None:
        super().__init__(message)
        self.step = step


class LaunchPutOff(LaunchError):
    """Nothing was started, for what passes: the same launch may succeed in a moment."""


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a sandbox's main process ended. Exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None
    """The signal that killed it, or its launcher."""


class Handle(Protocol):
    """What was started. `close` it when `ended` has returned and nothing of it is left."""

    @property
    def pidfd(self) -> int:
        """A descriptor of the process that signals go to: the sandbox's first process once it is up, if there is one
        to be seen, and the launcher's own until then."""
        ...

    @property
    def log(self) -> int:
        """A descriptor that does not block, to read what the processes write to their standard output and error."""
        ...

    @property
    def copy_of(self) -> str | None:
        """Of which fork parent its main process is a copy, by the parent's key; None: of none."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What could not be done for this launch, a sentence each."""
        ...

    async def up(self) -> bool:
        """Return True once the main process has been executed; False if all ended before, of which the log tells.

        Raises:
            LaunchError: It could not be executed.
        """
        ...

    async def ended(self) -> ExitStatus:
        """Return how it ended, when its first process and the launcher's own are gone."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to the first process, which passes it on. No-op if it has ended.

        SIGKILL ends all, as does any signal to what is not up yet; sent again, it ends a launcher that hangs.
        """
        ...

    def close(self) -> None:
        """Close every descriptor of it, which ends what is left; idempotent."""
        ...


class Launcher(Protocol):
    """Starts sandboxes."""

    def launch(self, plan: Plan) -> Handle:
        """Start a plan's processes, without waiting until they are up.

        Raises:
            LaunchError: Nothing could be started; nothing is left of it.
        """
        ...
