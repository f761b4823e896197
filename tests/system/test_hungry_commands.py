"""Commands that take all there is, in a forked sandbox: each is told why it failed, and the next one works."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash_mcp.sync import Hive
from tests.hive_process import hive_in
from tests.hub.backends.local.local_parts import directories, needs_isolation

KILLED = 137
SECONDS = 5.0
"""For commands that end by themselves only after long."""
NEXT_SECONDS = 20.0


@pytest.mark.heavy
@pytest.mark.timeout(240)
@needs_isolation
def test_a_command_that_takes_all_there_is_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASH_HUB_BACKEND__LAUNCHER", "fork")
    with directories() as root, hive_in(Path(root) / "hive") as (url, _), Hive(url) as hive:
        with hive.spawn("general", resources={"limits": {"memory": "512Mi"}}) as box:

            def goes_on() -> None:
                assert box.exec("echo fine", timeout_seconds=NEXT_SECONDS).stdout == "fine\n"

            eaten = box.exec("python3 -c 'x = [bytearray(1 << 20) for _ in iter(int, 1)]'", timeout_seconds=60)
            assert eaten.exit_code == KILLED and not eaten.timed_out
            goes_on()
            for place in ("/workspace", "/var"):
                filled = box.exec(f"head -c 100G /dev/zero > {place}/full; rm {place}/full", timeout_seconds=60)
                assert "No space left on device" in filled.stderr, (place, filled)
                goes_on()
            forked = box.exec("f() { f | f & }; f; sleep 100", timeout_seconds=SECONDS)
            assert "Resource temporarily unavailable" in forked.stderr, forked
            goes_on()
            poured = box.exec("head -c 10G /dev/zero", timeout_seconds=SECONDS)
            assert poured.truncated and (poured.timed_out or poured.stdout_bytes == 10 << 30)
            goes_on()
