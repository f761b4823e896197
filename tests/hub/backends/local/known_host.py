"""The host as backends in a test process see it: what is found out by starting processes is found out once.

Opening a backend takes nine processes otherwise, and hundreds of tests open one. `test_local_host` tests the original.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from ash_hub.backends.checks import Check
from ash_hub.backends.local import host
from ash_hub.backends.local.plans import HostFacts
from ash_hub.backends.local.settings import DEFAULT_FIRST_USER

__all__ = ["KnownHost", "facts", "isolation_problem", "machine_problem", "snapshot_problem"]


@functools.cache
def _facts(path: str | None) -> HostFacts:
    del path  # where bubblewrap is looked for
    return host.host_facts()


@functools.cache
def _checks(path: str | None) -> list[Check]:
    return host.required_checks(_facts(path))


def facts() -> HostFacts:
    return _facts(os.environ.get("PATH"))


def isolation_problem() -> str | None:
    """Return why no sandbox is isolated here; None if they are."""
    return next((check.detail for check in _checks(os.environ.get("PATH")) if not check.ok), None)


@functools.cache
def machine_problem(first_user: int = DEFAULT_FIRST_USER, shown: tuple[str, ...] = ()) -> str | None:
    return host.machine_problem(facts(), None, first_user, shown)


@functools.cache
def snapshot_problem(first_user: int = DEFAULT_FIRST_USER) -> str | None:
    return host.snapshot_problem(first_user)


class KnownHost:
    """Stands in for the module `host` in a backend."""

    def __getattr__(self, name: str) -> Any:
        return getattr(host, name)

    def host_facts(self) -> HostFacts:
        return facts()

    def required_checks(self, found: HostFacts) -> list[Check]:
        return _checks(os.environ.get("PATH")) if found == facts() else host.required_checks(found)

    def machine_problem(
        self, found: HostFacts, base: Path | None, first_user: int, shown: tuple[str, ...] = ()
    ) -> str | None:
        if found == facts():
            return machine_problem(first_user, shown)
        return host.machine_problem(found, base, first_user, shown)

    def snapshot_problem(self, first_user: int) -> str | None:
        return snapshot_problem(first_user)
