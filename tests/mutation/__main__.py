"""`python -m tests.mutation`: changes the modules of targets.toml one place at a time, and wants a test to fail.

Each mutant runs in a fork of this process, which has imported what the tests need and nothing of ours, so that one
costs little more than its tests. The order is random by a seed; what does not fit into the time is not run.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.mutation.forks import Job, baseline_seconds, run_jobs
from tests.mutation.lists import ROOT, Survivor, Target, read_survivors, read_targets, unused
from tests.mutation.mutants import Mutant, mutants_of

_TOLD: Final = 100
"""After so many mutants a line says how far it is."""


def main() -> int:
    options = _options()
    targets = [target for target in read_targets(options.root) if any(part in target.module for part in options.only)]
    known = read_survivors(options.root)
    todo, skipped = _jobs(targets, known, options.spare)
    random.Random(options.seed).shuffle(todo)
    print(f"{len(todo)} mutants of {len(targets)} modules, {skipped} named as equivalent; seed {options.seed}")
    ends, began = Counter[str](), time.monotonic()
    found = list[Job]()
    for job, end in run_jobs(todo, processes=options.processes, until=began + 60 * options.minutes):
        ends[end] += 1
        if ends.total() % _TOLD == 0:
            print(f"{ends.total()} of {len(todo)} after {time.monotonic() - began:.0f} s: {dict(ends)}", flush=True)
        if end == "survived":
            found.append(job)
            print(_stub(job.target, job.mutant), flush=True)
    ran = ends.total()
    print(f"{ran} of {len(todo)} run ({100 * ran // max(1, len(todo))} %): {dict(ends)}; seed {options.seed}")
    stale = list[Survivor]() if options.only != [""] else unused(known, targets)
    for survivor in stale:
        print(f"survivors.toml names no mutant of {survivor.module}: {survivor.line!r} {survivor.change}")
    return 1 if found or stale or not ran else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--minutes", type=float, default=25.0, help="when to begin no more mutants")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000), help="of the order")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="mutants at once")
    parser.add_argument("--spare", type=float, default=10.0, help="seconds beyond 5 times what the tests take")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the paths of the modules to change")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the project, whose lists are in tests/mutation")
    return parser.parse_args()


def _jobs(targets: Sequence[Target], known: Sequence[Survivor], spare: float) -> tuple[list[Job], int]:
    """Return what is to be run, and how many mutants are known to survive."""
    todo: list[Job] = []
    skipped = 0
    for target in targets:
        seconds = baseline_seconds(target)
        for mutant in mutants_of(target.source()):
            if any(survivor.names(target, mutant) for survivor in known):
                skipped += 1
            else:
                todo.append(Job(target, mutant, spare + 5 * seconds))
    return todo, skipped


def _stub(target: Target, mutant: Mutant) -> str:
    quoted = mutant.line if "'" not in mutant.line else f"''{mutant.line}''"
    fields = (f'module = "{target.module}"', f'where = "{mutant.where}"', f"line = '{quoted}'")
    return "\n".join(("survived:", "[[survivor]]", *fields, f'change = "{mutant.change}"', ""))


if __name__ == "__main__":
    sys.exit(main())
