"""What the package exports, and what importing it costs."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import ash_mcp
from ash_mcp import errors

EXPORTED = """
AshError AshTimeout BadArguments CallResult CapacityExceeded Cause Chunk ClientSettings CommandFailed
CommandNotStarted ConfigError Conflict ConnectFailed Destroyed EndReason ExecResult FileEntry FileError FileExists
FileNotFound FileNotPermitted Files Hive HiveFault IsADirectory Job JobInfo JobNotFound JobOutput JobResult Line
LocalProtocolError NoSpace NotADirectory NotFound OutputStream PermissionDenied PortClosed PortNotAllowed Progress
ProtocolError Pty PtyInfo PtyNotFound RecipeNotFound RemoteProtocolError RequestRefused ResourceAmounts Resources
ResultLost Run RunEnded RunId RunInfo RunNotFound RunTaken Sandbox SandboxError SandboxGone SandboxId SandboxInfo
SandboxNotFound SandboxRefused SandboxReset SessionName SessionTaken Share ShareInfo SnapshotId SnapshotInfo
SnapshotNotFound SpawnedMany Spawning StartFailed State StreamBroken Tool ToolNotFound TransportError Unauthenticated
Unsupported
""".split()


def test_exported_names_are_these_and_no_others():
    assert ash_mcp.__all__ == EXPORTED
    for name in EXPORTED:
        value = getattr(ash_mcp, name)
        home = importlib.import_module(getattr(value, "__module__", "ash_mcp.types"))
        assert getattr(home, name) is value
    assert set(EXPORTED) <= set(dir(ash_mcp))
    assert set(errors.__all__) <= set(EXPORTED)


def test_checkers_find_each_name_in_one_module():
    assert ash_mcp.__file__ is not None
    source = Path(ash_mcp.__file__)
    starred = re.findall(r"from ash_mcp\.(\w+) import \*", source.read_text(encoding="utf-8"))
    found = [name for home in starred for name in importlib.import_module(f"ash_mcp.{home}").__all__]
    assert [found.count(name) for name in EXPORTED] == [1] * len(EXPORTED)
    assert source.with_name("py.typed").is_file(), "without it checkers see no types outside of this repository"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        attrgetter("nonsense")(ash_mcp)


HEAVY = ("httpx", "httpcore", "ssl", "mcp", "pydantic", "trio", "asyncio", "tenacity", "typer", "rich")


@pytest.mark.parametrize(
    "statement",
    ["import ash_mcp", "from ash_mcp import Hive; Hive()", "import ash_mcp.wire"],
)
def test_import_brings_nothing_heavy(statement: str):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert not set(HEAVY) & set(run.stdout.split())


def test_import_costs_under_a_sixth_of_a_second_of_cpu():
    # 0.02 s on the machine where this was written; the bound leaves room for a slow one.
    code = "import time; t = time.process_time(); from ash_mcp import Hive; Hive(); print(time.process_time() - t)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(runs) < 0.15


def test_every_public_method_says_what_it_does():
    for cls in (ash_mcp.Hive, ash_mcp.Sandbox, ash_mcp.Files, ash_mcp.Job, ash_mcp.OutputStream):
        for name, member in vars(cls).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert inspect.getdoc(member), f"{cls.__name__}.{name}"
