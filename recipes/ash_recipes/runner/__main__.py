"""`python -m ash_recipes.runner`: serves one sandbox until it is told to end."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Return the exit code: 0 after SIGTERM, 2 when the environment is wrong."""
    # Before anything is imported: from here on SIGTERM ends with 0. What is started later brings its own way to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    from ash_recipes.runner import init
    from ash_recipes.runner.own_memory import KEY_VARIABLE, TOKEN_VARIABLE, close_memory, take_secret

    close_memory()  # before the fork: the first process's environment is the same
    key, egress_token = take_secret(os.environ, KEY_VARIABLE), take_secret(os.environ, TOKEN_VARIABLE)
    init.become_if_needed()
    # A tenth of the start would be a search for garbage among what is imported, which is none.
    usual = gc.get_threshold()
    gc.set_threshold(20_000, 50, 100)
    # Only what runs the sandbox imports more; the process that reaps stays small.
    from ash_recipes.runner.config import ConfigProblem, take_from
    from ash_recipes.runner.listener import open_listener

    try:
        config = take_from(os.environ, key, egress_token)
        listener = open_listener(config)
    except ConfigProblem as exc:
        sys.stderr.write(f"runner: {exc}\n")
        return 2
    from ash_recipes.runner.starting import StartingServer

    starting = StartingServer(config, listener)
    starting.start()
    from ash_recipes.runner import service

    return service.run(config, listener, starting, usual)


def end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Worker threads of a recipe may still be busy; the sandbox ends now all the same.
    os._exit(code)
