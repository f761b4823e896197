"""A launcher of plain processes without any isolation: only where nothing else works, and only when asked."""

from __future__ import annotations

from .plan import Plan
from .process import INIT, ProcessHandle, start

__all__ = ["UnsafeLauncher"]


class UnsafeLauncher:
    """Starts a plan's command as the keeper's own user, on the host as it is.

    Mounts, identity, limit on processes and system call filter of a plan are nothing that it could give.
    """

    def launch(self, plan: Plan) -> ProcessHandle:
        init = (plan.python, "-I", "-S", str(INIT), "@fd:up@", "@fd:life@", "0", "tree")
        return start((*init, *plan.command), plan, environment=plan.environment, directory=plan.directory)
