"""`python -m ash_recipes.runner`: serves one sandbox until it is told to end."""

from __future__ import annotations

import ctypes
import os
import sys

from ash_recipes.runner import init

_PR_SET_DUMPABLE = 4


def main() -> int:
    """Return the exit code: 0 after SIGTERM, 2 when the environment is wrong."""
    init.become_if_needed()
    _close_memory()
    # Only what runs the sandbox imports more; the process that reaps stays small.
    from ash_recipes.runner.config import ConfigProblem, take_from

    try:
        config = take_from(os.environ)
    except ConfigProblem as exc:
        sys.stderr.write(f"runner: {exc}\n")
        return 2
    from ash_recipes.runner import service

    return service.run(config)


def _close_memory() -> None:
    """Let nothing else in the sandbox read or change this process: what it starts runs as the same user."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Worker threads of a recipe may still be busy; the sandbox ends now all the same.
    os._exit(code)
