"""Every code block of the README runs, or is checked against what does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.docs.pages import RUN, commands

ROOT: Final = Path(__file__).parents[2]
BLOCKS: Final = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
SECONDS: Final = 60


@pytest.fixture
def environ(hive_url: str) -> dict[str, str]:
    return {**os.environ, "ASH_URL": hive_url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def lines(language: str) -> list[str]:
    """Return the commands of the blocks in a language, without comments."""
    return [
        line.partition("  #")[0].rstrip()
        for kind, text in BLOCKS
        if kind == language
        for line in text.splitlines()
        if line.strip()
    ]


def run(command: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_is_of_a_kind_that_is_checked_here() -> None:
    assert {kind for kind, _ in BLOCKS} == {"", "bash", "python"}


def test_the_python_block_does_what_it_shows(environ: dict[str, str]) -> None:
    (block,) = [text for kind, text in BLOCKS if kind == "python"]
    said = run([sys.executable, "-c", block], environ)
    assert said.splitlines()[0] == "hello you"
    assert "hi" in said.splitlines() and "Linux" in said


@pytest.mark.heavy
def test_the_shell_blocks_run_in_their_order(environ: dict[str, str]) -> None:
    for command in lines("bash"):
        if command.startswith("ash "):
            run(["bash", "-c", command], environ)


def test_the_make_targets_exist() -> None:
    for command in lines("bash"):
        if command.startswith("make "):
            subprocess.run([*command.split(), "-n"], cwd=ROOT, check=True, capture_output=True, timeout=SECONDS)


def test_the_line_for_claude_code_is_the_one_that_the_config_command_prints(environ: dict[str, str]) -> None:
    (shown,) = [command for command in lines("bash") if command.startswith("claude ")]
    plain = {key: value for key, value in environ.items() if key != "ASH_URL"}
    assert re.sub(r"\s+", " ", shown) in run(["ash", "config", "claude-code"], plain)


def test_the_lines_for_a_cluster_are_those_that_the_guide_has_run() -> None:
    run_there = "".join(commands(ROOT / "docs/deploy/README.md", RUN))
    shown = [command for command in lines("bash") if command.startswith(("helm ", "kubectl "))]
    assert len(shown) == 3 and all(command in run_there for command in shown)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
