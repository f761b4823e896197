"""Directories of very many files, listed and copied both ways: all of them, in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from ash_mcp.sync import Hive, Sandbox
from tests.hive_process import ASH

LIST_SECONDS: Final = 60
SECONDS_A_FILE: Final = 0.05
"""Some ten times of what one takes on two idle processors."""
MEMORY_BYTES: Final = 300 * 1024 * 1024


@pytest.fixture
def box(hive_url: str) -> Iterator[Sandbox]:
    with Hive(hive_url) as hive, hive.spawn("echo") as box:
        yield box


MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Tells what a command used at most, in KiB. What a process used before its command began counts as well, and the
tests' own process is large."""


def names(count: int) -> list[str]:
    return [f"{number:06}" for number in range(count)]


def copy(url: str, source: str, target: str, count: int) -> None:
    """Run `ash cp -r` and see that it keeps within its bounds."""
    began = time.monotonic()
    words = (sys.executable, "-I", "-S", "-c", MEASURE, *ASH, "--url", url, "cp", "-r", source, target)
    done = subprocess.run(words, capture_output=True, text=True)
    took, used = time.monotonic() - began, int(done.stdout) * 1024
    sys.stderr.write(f"{count} files to {target.partition(':')[0]}: {took:.1f} s, {used / 2**20:.0f} MiB\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert took < 10 + count * SECONDS_A_FILE and used < MEMORY_BYTES


def check_count(url: str, box: Sandbox, folder: Path, count: int) -> None:
    expected = names(count)
    box.exec(f"mkdir made && cd made && seq -f %06.0f 0 {count - 1} | xargs touch", check=True)
    began = time.monotonic()
    assert [entry.name for entry in box.files.list("made")] == expected
    sys.stderr.write(f"{count} files listed: {time.monotonic() - began:.1f} s\n")
    assert time.monotonic() - began < LIST_SECONDS

    copy(url, f"{box.session}:made", str(folder / "out"), count)
    assert sorted(os.listdir(folder / "out")) == expected

    for name in expected:
        (folder / "out" / name).write_text(name)
    copy(url, str(folder / "out"), f"{box.session}:in", count)
    sums = "cd in && ls | wc -l && cat * | md5sum"
    here = subprocess.run(["bash", "-c", f"cd {folder}/out && ls | wc -l && cat * | md5sum"], capture_output=True)
    assert box.exec(sums if count < 10_000 else sums.replace("cat *", "ls | xargs cat")).stdout == here.stdout.decode()


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_twenty_thousand_files_go_both_ways_beside_plain_tar(hive_url: str, box: Sandbox, folder: Path) -> None:
    check_count(hive_url, box, folder, 20_000)
    began = time.monotonic()
    subprocess.run("mkdir tar && tar -cf - -C out . | tar -xf - -C tar", shell=True, check=True, cwd=folder)
    sys.stderr.write(f"20000 files by plain tar on this machine: {time.monotonic() - began:.1f} s\n")
    assert len(os.listdir(folder / "tar")) == 20_000


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_six_thousand_files_are_listed_and_copied_both_ways(hive_url: str, box: Sandbox, folder: Path) -> None:
    check_count(hive_url, box, folder, 6000)


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_sixty_thousand_files_are_listed_and_copied_both_ways(hive_url: str, box: Sandbox, folder: Path) -> None:
    check_count(hive_url, box, folder, 60_000)
