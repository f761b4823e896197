"""The context that the parts of one runner share: the sandbox's directories, its environment, its jobs and ptys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ash_recipes.runner.jobs import Jobs
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.ptys import Ptys
from ash_recipes.runner.users import User, find_user, user_called

__all__ = ["Context", "Environment", "current", "install"]

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Environment:
    """The environment variables of what the sandbox runs; claimed ones are kept in memory and never shown."""

    def __init__(self, base: Mapping[str, str]) -> None:
        self._variables = dict(base)
        self.claimed = False

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return all of them, with `more` on top."""
        return {**self._variables, **(more or {})}

    def claim(self, more: Mapping[str, str]) -> None:
        """Add the spawn's variables and secrets, here and to this process, whose recipe may read them.

        Raises:
            Problem: A name or a value cannot stand in an environment; nothing was added.
        """
        check_variables(more)
        self._variables.update(more)
        os.environ.update(more)
        self.claimed = True


def check_variables(variables: Mapping[str, str]) -> None:
    """Refuse what cannot stand in an environment, without repeating any value.

    Raises:
        Problem: `bad_request`, naming the variable.
    """
    for name, value in variables.items():
        if _VARIABLE.fullmatch(name) is None:
            raise Problem("bad_request", f"{name!r} cannot be the name of an environment variable")
        if "\0" in value:
            raise Problem("bad_request", f"the value of environment variable {name} holds a NUL character")


@dataclass(slots=True)
class Context:
    workspace: Path
    """Where relative paths and commands start."""
    home: Path
    network_note: str = ""
    """Which network the sandbox has and why, where that is less than its recipe asks for; empty otherwise."""
    user: User | None = None
    """Whom commands run as; None: as the runner does."""
    environment: Environment = field(default_factory=lambda: Environment(os.environ))
    jobs: Jobs = field(default_factory=Jobs)
    ptys: Ptys = field(init=False)

    def __post_init__(self) -> None:
        self.ptys = Ptys(self.jobs)

    def user_named(self, name: str | None) -> User | None:
        """Return whom a command runs as that names a user, or none.

        Raises:
            Problem: There is no such user.
        """
        if name is None:
            return self.user
        return find_user(name) if self.user is None else user_called(name)

    def become(self, other: Context) -> None:
        """Be as `other` from here on, for whoever holds this one."""
        self.workspace, self.home, self.network_note = other.workspace, other.home, other.network_note
        self.user = other.user
        self.environment, self.jobs, self.ptys = other.environment, other.jobs, other.ptys

    @property
    def results(self) -> Path:
        """The directory for results of tools that were cut in an answer."""
        return self.home / ".ash" / "results"

    @property
    def spool(self) -> Path:
        """The directory for whole outputs that were cut in an answer."""
        return self.home / ".ash" / "output"


_current: list[Context] = []


def install(context: Context) -> None:
    """Make `context` the one that `current` returns; a process has one."""
    _current[:] = [context]


def current() -> Context:
    """Return this process's runner context, or a plain one in the working directory where no runner runs.

    So a recipe's tools work in a unit test or in a server of their own, too.
    """
    if not _current:
        here = Path.cwd()
        install(Context(workspace=here, home=Path(os.environ.get("HOME", str(here)))))
    return _current[0]
