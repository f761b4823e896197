"""The cluster that `.ci/cluster` has made on this machine: parts of it are stopped, and started again.

Its script may be sourced: `halt` ends a part by name, and `up` starts those that are not there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import pytest

__all__ = ["Part", "require_own_cluster", "start", "stopped"]

Part = Literal["apiserver", "kubelet"]

_SCRIPT: Final = Path(os.environ.get("ASH_TEST_CLUSTER", Path(__file__).parents[3] / "shared/cluster/cluster.sh"))


def require_own_cluster() -> None:
    """Skip on a cluster that is not the script's."""
    named = os.environ.get("ASH_TEST_KUBECONFIG")
    if not named:
        pytest.skip("ASH_TEST_KUBECONFIG names no cluster")
    if not _SCRIPT.is_file() or os.geteuid() != 0:
        pytest.skip("parts of a cluster are stopped on the one that .ci/cluster makes as root, and nowhere else")
    if Path(named).resolve() != Path(_sourced('echo "$ADMIN"').strip()).resolve():
        pytest.skip(f"{named} is not the cluster that .ci/cluster makes, whose parts can be stopped")


def start() -> None:
    """Start whatever does not run, and return once the API server answers and the node is ready."""
    environ = {**os.environ, "ASH_CLUSTER_KWOK": "1"}
    said = ""
    for _ in range(3):  # a part may end while others still start, as for `.ci/cluster`
        done = subprocess.run([_SCRIPT, "up"], env=environ, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return
        said += done.stderr[-2000:]
    raise AssertionError(f"the cluster does not come up again: {said}")


@contextmanager
def stopped(part: Part) -> Generator[None]:
    """Stop a part of the cluster, and have all of it run at the end."""
    require_own_cluster()
    try:
        _sourced(f"halt {part} 2")
        yield
    finally:
        start()


def _sourced(command: str) -> str:
    words = ["bash", "-c", f'. "$1"; {command}', "bash", _SCRIPT]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout
