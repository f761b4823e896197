"""Checks that the network policy of a sandbox is in force, where it has one: its canary must refuse.

A pod is open until the cluster's network plugin has heard of it. This runs in a thread of its own: the main loop
stands still while a recipe is imported, and would take an answer that has come for one that has not.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Final

__all__ = ["policy_problem"]

WAIT_SECONDS: Final = 30.0
CONNECT_SECONDS: Final = 1.0
"""A policy that drops says nothing: so long without an answer is a refusal."""
PAUSE_SECONDS: Final = 0.1


def policy_problem(canary: tuple[str, int] | None, seconds: float = WAIT_SECONDS) -> str | None:
    """Return None once the canary refuses, or does not answer; what is wrong when it still answers after that time.

    Args:
        canary: Host and port; None is refused.
    """
    give_up_at = time.monotonic() + seconds
    while canary is not None and _answers(canary):
        if time.monotonic() >= give_up_at:
            host, port = canary
            return (
                f"its network policy is not in force: port {port} of {host} still answers after {seconds:g} s. "
                "The cluster's network plugin enforces no NetworkPolicies, or none of them selects this sandbox"
            )
        time.sleep(PAUSE_SECONDS)
    return None


def _answers(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, CONNECT_SECONDS):
        return True
    return False
