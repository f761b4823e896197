"""The two lists of the mutation run: which modules are changed, and which changes nobody can notice."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mutation.mutants import Mutant, mutants_of

__all__ = ["ROOT", "Survivor", "Target", "read_survivors", "read_targets", "unused"]

ROOT: Final = Path(__file__).parents[2]
_LISTS: Final = "tests/mutation"
_PACKAGES: Final = ("hub/", "router/", "recipes/")


@dataclass(frozen=True, slots=True)
class Target:
    """A module, and the files of tests that must notice a change of it."""

    module: str
    """Its path below the root."""
    tests: tuple[str, ...]
    root: Path = ROOT

    @property
    def path(self) -> Path:
        return self.root / self.module

    @property
    def name(self) -> str:
        """As it is imported."""
        below = next(
            (self.module.removeprefix(part) for part in _PACKAGES if self.module.startswith(part)), self.module
        )
        return below.removesuffix(".py").replace("/", ".")

    def source(self) -> str:
        return self.path.read_text()


@dataclass(frozen=True, slots=True)
class Survivor:
    """Mutants that are equivalent to their module, and why; `*` for the line or the change means all of them."""

    module: str
    where: str
    line: str
    change: str
    why: str

    def names(self, target: Target, mutant: Mutant) -> bool:
        return (
            (self.module, self.where) == (target.module, mutant.where)
            and self.line in ("*", mutant.line)
            and self.change in ("*", mutant.change)
        )


def read_targets(root: Path = ROOT) -> Sequence[Target]:
    """Read the modules to change; a file that is named and missing is an error."""
    rows = tomllib.loads((root / _LISTS / "targets.toml").read_text())["target"]
    targets = [Target(row["module"], tuple(row["tests"]), root) for row in rows]
    for target in targets:
        for path in (target.module, *target.tests):
            if not (root / path).is_file():
                raise FileNotFoundError(f"targets.toml names {path}, which does not exist")
    return targets


def read_survivors(root: Path = ROOT) -> Sequence[Survivor]:
    """Read which mutants are known to survive; one without a reason is an error."""
    rows = tomllib.loads((root / _LISTS / "survivors.toml").read_text()).get("survivor", [])
    survivors = [Survivor(**row) for row in rows]
    for survivor in survivors:
        if not survivor.why.strip():
            raise ValueError(f"survivors.toml does not say why {survivor.line!r} is equivalent")
    return survivors


def unused(survivors: Sequence[Survivor], targets: Sequence[Target]) -> Sequence[Survivor]:
    """Return those that name no mutant: their line was changed."""
    mutants = [(target, mutant) for target in targets for mutant in mutants_of(target.source())]
    return [each for each in survivors if not any(each.names(target, mutant) for target, mutant in mutants)]
