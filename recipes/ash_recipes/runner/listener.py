"""The socket on which a runner listens."""

from __future__ import annotations

import os
import socket

from ash_recipes.runner.config import ConfigProblem, Listen, RunnerConfig

__all__ = ["BACKLOG", "is_network", "open_listener"]

BACKLOG = 512


def open_listener(config: RunnerConfig) -> socket.socket:
    """Listen where the configuration says.

    Raises:
        ConfigProblem: That is not possible, or others could reach it and there is no key to know the hive by.
    """
    try:
        listener = _open(config.listen)
    except OSError as exc:
        raise ConfigProblem(f"the runner cannot listen: {exc}") from exc
    if is_network(listener) and not (config.public_key and config.key):
        listener.close()
        raise ConfigProblem("on TCP a runner serves only with a public_key and with ASH_SANDBOX_KEY")
    return listener


def is_network(listener: socket.socket) -> bool:
    """Say whether anybody but who was given its Unix socket can connect."""
    return listener.family != socket.AF_UNIX


def _open(listen: Listen) -> socket.socket:
    if listen.descriptor is not None:
        os.set_inheritable(listen.descriptor, False)
        return socket.socket(fileno=listen.descriptor)
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    return socket.create_server((listen.host, listen.port), family=family, backlog=BACKLOG)
