"""Files of gibibytes through the door to files, with the memory of the hub that passes them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.hive_process import ASH, hive_in

GIB: Final = 2**30


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_five_gibibytes_pass_each_way_through_a_small_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASH_HUB_BACKEND__WORKSPACE_BYTES", str(6 * GIB))
    monkeypatch.setenv("ASH_HUB_BACKEND__MEMORY_BYTES", str(8 * GIB))
    size = 5 * GIB
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as home, hive_in(Path(home)) as (url, pid):
        with httpx.Client() as http:
            base = url.removesuffix("/mcp")
            spawn = (*ASH, "--url", url, "spawn", "echo", "--session", "large")
            subprocess.run(spawn, check=True, stdout=subprocess.DEVNULL)
            block, sent = os.urandom(2**20), hashlib.md5()

            def body() -> Any:
                for number in range(size // 2**20):
                    piece = number.to_bytes(8) + block[8:]
                    sent.update(piece)
                    yield piece

            began = time.monotonic()
            put = http.put(f"{base}/s/large/files/f", content=body(), timeout=120)
            assert put.json() == {"bytes": size}
            middle, got = time.monotonic(), hashlib.md5()
            with http.stream("GET", f"{base}/s/large/files/f", timeout=120) as answer:
                for piece in answer.iter_raw():
                    got.update(piece)
            ended = time.monotonic()
        peak = peak_bytes(pid)
    sys.stderr.write(f"5 GiB up {middle - began:.0f} s, down {ended - middle:.0f} s, hub {peak / 2**20:.0f} MiB\n")
    assert got.digest() == sent.digest() and peak < 150 * 2**20
