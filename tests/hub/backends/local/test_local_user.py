"""The suites of the local backend, run by an ordinary user: started by root, which gives up all it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

USER = "54321"
ROOT = Path(__file__).parents[4]
SUITES = (
    "tests/conformance/test_backends.py",
    "tests/hub/backends/local/test_local_isolation.py",
    "tests/hub/backends/local/test_local_escapes.py",
    "tests/hub/backends/local/test_local_protections.py",
    "tests/hub/backends/local/test_local_crash.py",
)


def as_user(*words: str) -> subprocess.CompletedProcess[str]:
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    return subprocess.run(
        [setpriv, "--reuid", USER, "--regid", USER, "--clear-groups", sys.executable, *words],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.heavy
def test_an_ordinary_user_gets_the_same_isolation() -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root, with setpriv, can run tests as somebody else")
    # Once more from within: what setpriv itself executes, it executes with root's way through directories.
    trial = "import subprocess, sys, anyio, pydantic, pytest; subprocess.run([sys.executable, '-c', ''], check=True)"
    reachable = as_user("-c", trial).returncode == 0
    if not reachable:
        pytest.skip(f"an ordinary user cannot run {sys.executable}")
    done = as_user("-m", "pytest", "-p", "no:cacheprovider", "-rs", *SUITES)
    assert done.returncode == 0 and "cannot be isolated" not in done.stdout, done.stdout + done.stderr
