"""The log files of a hive, which its replicas write together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WRITER = """
import logging, pathlib, sys
from ash_hub.serving import logs
logs._FILE_BYTES = 20_000
logs.set_up(pathlib.Path(sys.argv[1]), "info", to_stderr=False)
for number in range(200):
    logging.getLogger("ash.hub").info("line %s of %d", "x" * 40, number)
"""


def test_processes_that_write_one_log_lose_no_line_when_it_is_rotated(tmp_path: Path) -> None:
    writers = [subprocess.Popen((sys.executable, "-c", WRITER, str(tmp_path)), stderr=subprocess.PIPE) for _ in "abc"]
    for writer in writers:
        assert writer.communicate(timeout=60)[1] == b"" and writer.returncode == 0
    files = list(tmp_path.glob("hive.log*"))
    assert len(files) > 1
    assert sum(file.read_text().count("line ") for file in files) == 600
