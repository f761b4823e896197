"""Lines are written beside the hive: whatever holds them up holds up nobody who logs, and none is missing unsaid."""

from __future__ import annotations

import errno
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from ash_hub.serving.audit import missing_line
from ash_hub.serving.log_writers import BackgroundHandler, SharedFile
from tests.hub.serving.held_locks import held, locks_of

SECONDS = 30.0


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, "", 0, text, None, None)


class Disk:
    """Takes lines when it is let, and fails when it is told."""

    def __init__(self, *, free: bool = True) -> None:
        self.lines: list[str] = []
        self.asked = threading.Event()
        self.free = threading.Event()
        self.full = False
        if free:
            self.free.set()

    def write(self, lines: Sequence[str]) -> None:
        self.asked.set()
        assert self.free.wait(SECONDS)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines += lines


def handler_of(disk: Disk, most: int = 10) -> BackgroundHandler:
    return BackgroundHandler(disk.write, most=most, missing=lambda count: f"{count} missing")


def test_a_full_queue_drops_lines_at_once_and_counts_them() -> None:
    disk = Disk(free=False)
    handler = handler_of(disk)
    handler.emit(record("first"))
    assert disk.asked.wait(SECONDS)
    for number in range(25):
        handler.handle(record(str(number)))
    disk.free.set()
    handler.close()
    assert disk.lines == ["first", "15 missing", *map(str, range(10))]


def test_what_a_full_disk_refuses_is_counted_before_what_it_takes_again() -> None:
    disk = Disk()
    losses: list[str] = []
    handler = BackgroundHandler(
        disk.write, most=10, missing=lambda count: f"{count} missing", on_loss=lambda: losses.append("loss")
    )
    disk.full = True
    for text in "abc":
        handler.handle(record(text))
        handler.flush()
    disk.full = False
    handler.handle(record("d"))
    handler.close()
    assert disk.lines == ["3 missing", "d"]
    assert losses == ["loss"]


def test_lines_that_are_missing_are_told_without_another_line() -> None:
    disk = Disk(free=False)
    handler = handler_of(disk, most=1)
    handler.emit(record("first"))
    assert disk.asked.wait(SECONDS)
    handler.handle(record("second"))
    handler.handle(record("third"))
    disk.free.set()
    handler.flush()
    assert disk.lines[-1] == "second" and "1 missing" in disk.lines
    handler.close()


def test_an_end_waits_for_a_disk_that_does_not_answer_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash_hub.serving.log_writers._END_SECONDS", 0.01)
    disk = Disk(free=False)
    handler = handler_of(disk)
    handler.handle(record("first"))
    handler.flush()
    handler.close()
    assert disk.lines == []
    disk.free.set()


def test_the_line_about_missing_lines_of_the_audit_is_one_of_the_audit() -> None:
    line = json.loads(missing_line(7))
    assert line.pop("at").endswith("Z")
    assert line == {"event": "audit", "outcome": "lines_missing", "lines": 7}


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_itself(tmp_path: Path) -> None:
    script = """
import pathlib, resource, sys
from ash_hub.serving.log_writers import SharedFile
file = SharedFile(pathlib.Path(sys.argv[1]), max_bytes=1 << 20, backups=1)
file.write(["x" * 400])
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
try:
    file.write(["y" * 400])
except OSError:
    print("refused")
file.write(["z"])
"""
    file = tmp_path / "a.log"
    done = subprocess.run((sys.executable, "-c", script, str(file)), capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout, done.stderr) == ("refused\n", "")
    assert file.read_text() == "x" * 400 + "\nz\n"


def test_a_file_is_kept_under_numbers_up_to_so_many(tmp_path: Path) -> None:
    file = SharedFile(tmp_path / "a.log", max_bytes=10, backups=2)
    for text in "abcd":
        file.write([text * 8])
    kept = {path.name: path.read_text()[0] for path in tmp_path.glob("a.log*")}
    assert kept == {"a.log": "d", "a.log.1": "c", "a.log.2": "b"}


LOGGER = """
import logging, os, pathlib, sys
from ash_hub.serving import logs
logs._LINES = logs._AUDIT_LINES = 100
logs.set_up(pathlib.Path(sys.argv[1]), "info", to_stderr=False)
for number in range(1000):
    logging.getLogger("ash.hub").info("line %d", number)
    logging.getLogger("ash.audit").info("audit %d", number)
print("logged", flush=True)
{then}
"""


def logging_process(folder: Path, then: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-c", LOGGER.format(then=then), str(folder))
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_that_holds_the_locks_holds_up_no_other_and_no_line_is_missing_unsaid(tmp_path: Path) -> None:
    with held(*locks_of(tmp_path)):
        logger = logging_process(tmp_path, "sys.stdin.read()")
        assert logger.stdout is not None
        assert logger.stdout.readline() == "logged\n"
        assert not (tmp_path / "hive.log").read_text() and not (tmp_path / "audit.log").read_text()
    assert logger.communicate(timeout=SECONDS)[1] == "" and logger.returncode == 0
    written = (tmp_path / "hive.log").read_text()
    missing = [int(count) for count in re.findall(r"(\d+) lines are missing", written)]
    assert missing and sum(missing) + len(re.findall(r"line \d+\n", written)) >= 1000  # more: it tells of the audit
    audited = (tmp_path / "audit.log").read_text().splitlines()
    told = [json.loads(line)["lines"] for line in audited if line.startswith("{")]
    assert told and sum(told) + sum(line.startswith("audit ") for line in audited) == 1000


def test_a_process_ends_although_another_holds_the_locks(tmp_path: Path) -> None:
    with held(*locks_of(tmp_path)):
        logger = logging_process(tmp_path, "")
        assert logger.communicate(timeout=SECONDS) == ("logged\n", "")
        assert logger.returncode == 0


def test_a_forked_process_writes_its_own_lines_and_the_first_one_too(tmp_path: Path) -> None:
    then = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, from Python 3.12 on
logging.root.handlers[0].flush()
child = os.fork()
logging.getLogger("ash.hub").info("after the fork in %s", "the child" if child == 0 else "its parent")
if child == 0:
    logging.root.handlers[0].flush()
    os._exit(0)
os.waitpid(child, 0)
"""
    logger = logging_process(tmp_path, then)
    assert logger.communicate(timeout=SECONDS) == ("logged\n", "")
    written = (tmp_path / "hive.log").read_text()
    assert written.count("after the fork in the child") == written.count("after the fork in its parent") == 1
