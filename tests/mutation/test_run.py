"""The mutation run as a command, on a project of one module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(320)]

ROOT: Final = Path(__file__).parents[2]
MODULE: Final = """
def at_most(count: int) -> int:
    if count > 3:
        return 3
    return count
"""
TESTS: Final = """
from module import at_most

def test_it():
    assert [at_most(each) for each in (2, 3, 4, 9)] == [2, 3, 3, 3]
"""
EQUIVALENT: Final = """
[[survivor]]
module = "module.py"
where = "at_most"
line = "if count > 3:"
change = "> -> >="
why = "three is three either way"
"""
ALSO_EQUIVALENT: Final = EQUIVALENT.replace("> -> >=", "3 -> 2")


def run(
    project: Path, survivors: str, *, tests: str = TESTS, module: str = MODULE
) -> subprocess.CompletedProcess[str]:
    lists = project / "tests/mutation"
    lists.mkdir(parents=True)
    (project / "module.py").write_text(module)
    (project / "test_module.py").write_text(tests)
    (project / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (lists / "targets.toml").write_text('[[target]]\nmodule = "module.py"\ntests = ["test_module.py"]\n')
    (lists / "survivors.toml").write_text(survivors)
    command = (sys.executable, "-m", "tests.mutation", "--root", str(project), "--seed", "7", "--spare", "3")
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_run_whose_survivors_are_all_named_has_passed_and_says_what_it_did(tmp_path: Path) -> None:
    done = run(tmp_path, EQUIVALENT + ALSO_EQUIVALENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 mutants of 1 modules, 2 named as equivalent; seed 7" in done.stdout
    assert "6 of 6 run (100 %): {'killed': 6}; seed 7" in done.stdout


def test_a_survivor_that_nobody_named_fails_the_run_and_is_shown_as_it_would_be_named(tmp_path: Path) -> None:
    done = run(tmp_path, EQUIVALENT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ALSO_EQUIVALENT.partition("why")[0].replace('"if count > 3:"', "'if count > 3:'") in done.stdout


def test_a_named_survivor_that_is_no_mutant_any_more_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, EQUIVALENT + ALSO_EQUIVALENT + EQUIVALENT.replace("count > 3", "count > 4"))
    assert done.returncode == 1 and "names no mutant of module.py: 'if count > 4:'" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("survivors", "tests", "said"),
    [
        (EQUIVALENT.replace("three is three either way", " "), TESTS, "does not say why"),
        ("", TESTS.replace("[2, 3, 3, 3]", "[]"), "the tests of module.py fail without any change"),
    ],
    ids=["no reason", "failing tests"],
)
def test_a_run_that_can_tell_nothing_has_failed(tmp_path: Path, survivors: str, tests: str, said: str) -> None:
    done = run(tmp_path, survivors, tests=tests)
    assert done.returncode == 1 and said in done.stderr, done.stdout + done.stderr


def test_a_mutant_that_does_not_end_is_ended_and_counts_as_noticed(tmp_path: Path) -> None:
    module = "def count() -> int:\n    number = 0\n    while number < 3:\n        number += 1\n    return number\n"
    tests = "from module import count\n\ndef test_it():\n    assert count() == 3\n"
    done = run(tmp_path, "", tests=tests, module=module)
    assert "'took too long': 2" in done.stdout, done.stdout + done.stderr
