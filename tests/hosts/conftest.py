"""The table of what was seen of each host, printed at the end of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

HEAD = ("host", "over", "protocol", "hive's tools", "a sandbox's tools", "after destroy", "seconds")
ROWS = pytest.StashKey[list[tuple[str, ...]]]()


@pytest.fixture(scope="session")
def hosts_folder() -> Path:
    """What `.ci/hosts` fills: hosts and Node in `node_modules/.bin`, each framework's Python in `frameworks/NAME`."""
    folder = os.environ.get("ASH_TEST_HOSTS")
    if not folder:
        pytest.skip("ASH_TEST_HOSTS names no folder with MCP hosts; .ci/hosts fills one")
    return Path(folder)


@pytest.fixture
def table(pytestconfig: pytest.Config) -> list[tuple[str, ...]]:
    """The rows so far, each a cell for each of `HEAD`."""
    return pytestconfig.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.setdefault(ROWS, [])
    for row in (HEAD, ("---",) * len(HEAD), *rows) if rows else ():
        terminalreporter.write_line(f"| {' | '.join(row)} |")
