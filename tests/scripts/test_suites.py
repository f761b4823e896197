"""The account of `.ci/run`: a suite that ran no test has failed."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PASSING: Final = "import pytest\n\n@pytest.mark.wanted\ndef test_it():\n    pass\n"
SKIPPED: Final = "import pytest\n\n@pytest.mark.wanted\ndef test_it():\n    pytest.skip('no such part here')\n"
LATE: Final = """import pathlib, pytest

@pytest.mark.wanted
def test_it():
    came = pathlib.Path('came')
    assert len(came.read_text() if came.exists() else '') >= {0}, came.write_text('x')
"""
UNMARKED: Final = "def test_it():\n    pass\n"


def run_suite(folder: Path, test: str, command: str = "marked one 60 wanted") -> subprocess.CompletedProcess[str]:
    """Run one suite over a folder that holds one test, and its summary."""
    (folder / "test_one.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  wanted: x\n")
    script = f". {shlex.quote(str(ROOT))}/.ci/_suites.sh; {command}; summary"
    pytest = folder / "run-pytest"
    pytest.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m pytest -p tests.reporting "$@"\n')
    pytest.chmod(0o755)
    return subprocess.run(
        ["bash", "-uo", "pipefail", "-c", script],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "ASH_TEST_MUST_PASS": "1", "PYTEST": str(pytest)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_suite_with_a_test_that_passes_has_passed(tmp_path: Path) -> None:
    done = run_suite(tmp_path, PASSING)
    assert (done.returncode, "1 passed, 0 failed, 0 skipped" in done.stdout) == (0, True), done.stdout


@pytest.mark.parametrize(("test", "outcome"), [(UNMARKED, "exit 5"), (SKIPPED, "exit 1")], ids=["lost", "skipped"])
def test_a_suite_in_which_nothing_ran_has_failed(tmp_path: Path, test: str, outcome: str) -> None:
    done = run_suite(tmp_path, test)
    assert done.returncode == 1 and f"FAILED: {outcome}" in done.stdout, done.stdout


@pytest.mark.heavy
def test_a_test_that_passes_when_it_runs_again_by_itself_is_named_and_one_that_fails_again_has_failed(
    tmp_path: Path,
) -> None:
    done = run_suite(tmp_path, LATE.format(1))
    assert done.returncode == 0 and "passed only when run again: test_one.py::test_it" in done.stdout, done.stdout
    done = run_suite(tmp_path, LATE.format(2))
    assert done.returncode == 1 and "FAILED: exit 1" in done.stdout, done.stdout


def test_the_paths_that_an_ordinary_user_runs_exist() -> None:
    paths = (ROOT / ".ci/of-a-user.txt").read_text().split()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert paths == sorted(set(paths))


def test_a_suite_that_takes_too_long_has_failed_and_is_ended(tmp_path: Path) -> None:
    done = run_suite(tmp_path, PASSING, "suite slow 1 sleep 50")
    assert done.returncode == 1 and "FAILED: time out" in done.stdout, done.stdout
