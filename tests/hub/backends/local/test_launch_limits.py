"""What a launcher makes of a plan's limits where its own user has less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ash_hub.backends.local import host
from ash_hub.backends.local.keeper import launchers

NOBODY = 65534
SCRIPT = """
import json, os, resource, sys
sys.path.append(sys.argv[1])
from launchers.plan import Plan
from launchers.process import start
os.chdir(sys.argv[2])
given = json.loads(sys.argv[3])
for name, hard in given["hard"].items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (hard, hard))
if given["user"]:
    os.setgroups([])
    os.setresgid(*[given["user"]] * 3)
    os.setresuid(*[given["user"]] * 3)
plan = Plan(command=(), python="", rlimits=given["wanted"])
child = start(["/bin/cat", "/proc/self/limits"], plan)
os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
print(os.read(child.log, 65536).decode())
"""


def hard_limits(place: Path, *, user: int = 0, hard: dict[str, int], wanted: dict[str, int]) -> dict[str, str]:
    """Return the hard limits of a process that a keeper with limits of its own starts, by the kernel's names."""
    directory = str(Path(launchers.__file__).parents[1])
    given = json.dumps({"user": user, "hard": hard, "wanted": wanted})
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, directory, str(place), given]
    said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert said.returncode == 0, said.stderr
    return {line[:26].strip(): line[47:68].strip() for line in said.stdout.splitlines()}


def test_an_ordinary_user_s_hard_limits_of_zero_stay(tmp_path: Path) -> None:
    user = NOBODY if os.geteuid() == 0 else 0
    found = hard_limits(tmp_path, user=user, hard={"CORE": 0, "MEMLOCK": 0}, wanted={"CORE": 1, "MEMLOCK": 8192})
    assert found["Max core file size"] == "0" and found["Max locked memory"] == "0"


@pytest.mark.skipif(not host.may_raise_limits(), reason="only who may raise limits can have a higher one on cores")
def test_whoever_may_raise_the_limit_on_cores_keeps_the_host_s_program_from_starting(tmp_path: Path) -> None:
    found = hard_limits(tmp_path, hard={"CORE": 0, "MEMLOCK": 4096}, wanted={"CORE": 1, "MEMLOCK": 8192})
    assert found["Max core file size"] == "1" and found["Max locked memory"] == "4096"


@pytest.mark.parametrize(("wanted", "had"), [(80, "50"), (40, "40")])
def test_a_sandbox_has_half_of_the_keeper_s_descriptors_at_most(tmp_path: Path, wanted: int, had: str) -> None:
    assert hard_limits(tmp_path, hard={"NOFILE": 100}, wanted={"NOFILE": wanted})["Max open files"] == had
