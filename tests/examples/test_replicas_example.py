"""The example of three hives behind nginx, whole and in a short form of its storm."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.example_runs import EXAMPLES

pytestmark = [pytest.mark.replicas, pytest.mark.timeout(400)]


def run(*arguments: str) -> str:
    for program in ("nginx", "redis-server"):
        if shutil.which(program) is None and shutil.which(program, path="/usr/sbin:/sbin") is None:
            pytest.skip(f"there is no {program}")
    command = [sys.executable, str(EXAMPLES / "replicas" / "run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_tests_of_the_mcp_face_pass_through_nginx() -> None:
    assert " passed" in run("suite")


def test_calls_survive_the_kills_of_hives_that_did_not_have_them() -> None:
    # How many calls are on a hive when it is killed is the machine's doing; that no other call fails is ours.
    said = run("storm", "--seconds", "30", "--calls", "2500", "--least", "0.95")
    assert "; 0 problems" in said
