"""A pytest plugin: numbers that tests record are shown at the end, and a run in which nothing passed can be a failure.

A test records with `record_property(name, value)`. With ASH_TEST_MUST_PASS set, a run in which no test passed fails.
"""

from __future__ import annotations

import os
from typing import Any

import pytest


def _reporter(session: pytest.Session) -> Any:
    """Return what tells a person of the run; None in one of several workers, which sees only its own tests."""
    return session.config.pluginmanager.get_plugin("terminalreporter")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    done = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())]
    for report in done:
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {name}: {value}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = _reporter(session)
    if not os.environ.get("ASH_TEST_MUST_PASS") or reporter is None or session.config.option.collectonly:
        return
    if session.exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        reporter.write_line("no test passed: each was skipped, for the reason above", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
