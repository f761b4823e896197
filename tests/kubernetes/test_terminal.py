"""A terminal in a pod, through the hive: a real pty, sizes, keys, and a connection that is cut."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import pytest

from ash_mcp import Hive
from tests.cutting_proxy import cutting
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.pod_parts import environment_of, serving

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(cluster).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def home() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as path:
        yield Path(path)


async def test_a_terminal_of_a_pod_survives_a_cut_and_ends_with_its_exit_code(home: Path) -> None:
    async with serving(home) as url, cutting([urlsplit(url).port or 0]) as proxy, Hive(proxy.url) as hive:
        async with hive.spawn("general") as box, box.pty(["bash", "--norc"], rows=33, columns=101) as pty:
            shown = b""

            async def see(text: bytes) -> None:
                nonlocal shown
                with anyio.fail_after(60):
                    while text not in shown:
                        shown += await pty.read()

            await pty.write("tty; stty size\n")
            await see(b"/dev/pts/")
            await see(b"33 101")
            proxy.cut()
            await pty.write("sleep 1000\n")
            await see(b"sleep 1000\r\n")
            await pty.write(b"\x03")
            await pty.write("echo code $?\n")
            await see(b"code 130")
            await pty.resize(40, 120)
            await pty.write("stty size; exit 7\n")
            await see(b"40 120")
            assert await pty.wait() == 7
