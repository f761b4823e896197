"""`python -m ash_recipes.bundle FOLDER` builds the runner's bundle; with `--into` it keeps one there by its input."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ash_recipes.bundle.build import build, build_once
from ash_recipes.bundle.contents import BundleProblem

_SEED = "0"


def main(arguments: list[str]) -> int:
    """Return the exit code: 0, 1 where it cannot be built, 2 where the arguments are wrong."""
    if os.environ.get("PYTHONHASHSEED") != _SEED:  # compiled sets have an order
        environment = {**os.environ, "PYTHONHASHSEED": _SEED}
        os.execve(sys.executable, [sys.executable, "-m", "ash_recipes.bundle", *arguments], environment)
    try:
        match arguments:
            case ["--into", parent]:
                sys.stdout.write(f"{build_once(Path(parent))}\n")
            case [target] if not target.startswith("-"):
                build(Path(target))
            case _:
                sys.stderr.write("usage: python -m ash_recipes.bundle [--into] FOLDER\n")
                return 2
    except (BundleProblem, OSError) as problem:
        sys.stderr.write(f"bundle: {problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
