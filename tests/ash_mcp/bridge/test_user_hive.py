"""Finding this user's hive, and starting one where there is none. The hive here is a stand-in that only answers."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from ash_mcp.bridge.background import HiveFiles, UserHive
from ash_mcp.errors import AshTimeout, ConfigError, ConnectFailed
from ash_mcp.paths import HIVE_FILE, default_run_dir, default_state_dir

pytestmark = pytest.mark.anyio

STAND_IN = """
import http.server, json, os, pathlib, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("ash-origin", "hub"); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
run_dir = pathlib.Path(os.environ["ASH_HUB_RUN_DIR"])
with open(run_dir / "starts", "a") as file:
    file.write("%s %d\\n" % (os.environ["ASH_HUB_IDLE_EXIT_SECONDS"], os.getsid(0)))
shape = {"url": "http://127.0.0.1:%d/mcp" % server.server_address[1], "pid": os.getpid(), "started_at": time.time()}
(run_dir / "fresh").write_text(json.dumps(shape))
(run_dir / "fresh").replace(run_dir / "hive.json")
server.serve_forever()
"""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[HiveFiles]:
    files = HiveFiles(tmp_path / "run", tmp_path / "log")
    yield files
    announced = files.run_dir / HIVE_FILE
    if announced.exists() and (files.run_dir / "starts").exists():
        os.kill(json.loads(announced.read_text())["pid"], signal.SIGKILL)


def _hive(files: HiveFiles, script: str, start_seconds: float = 20.0) -> UserHive:
    return UserHive(files=files, command=(sys.executable, "-c", script), start_seconds=start_seconds)


@pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": uv}) for uv in (False, True)], ids=["asyncio", "uvloop"]
)
async def test_many_who_start_at_once_start_one_hive(files: HiveFiles) -> None:
    found: list[str] = []

    async def start() -> None:
        found.append(await _hive(files, STAND_IN).find_or_start())

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(start)
    assert len(found) == 5 and len(set(found)) == 1
    (start_line,) = (files.run_dir / "starts").read_text().splitlines()
    idle_exit, session = start_line.split()
    assert idle_exit == "600", "it ends itself when idle"
    assert int(session) != os.getsid(0), "it is in a session of its own"
    assert await _hive(files, STAND_IN).find() == found[0]


async def test_a_hive_that_cannot_start_is_an_error_with_its_last_words(files: HiveFiles) -> None:
    with pytest.raises(ConnectFailed, match="bubblewrap is missing") as caught:
        await _hive(files, "raise SystemExit('bubblewrap is missing')").find_or_start()
    assert "ash doctor" in caught.value.message


async def test_a_hive_that_does_not_come_up_is_waited_for_only_so_long(files: HiveFiles) -> None:
    note = "import os, time; open(os.environ['ASH_HUB_RUN_DIR'] + '/pid', 'w').write(str(os.getpid()))"
    script = f"{note}; time.sleep(60)"
    with pytest.raises(AshTimeout, match="within 1 s"):
        await _hive(files, script, start_seconds=1.0).find_or_start()
    with anyio.fail_after(60):
        while not (files.run_dir / "pid").exists() or not (said := (files.run_dir / "pid").read_text()):
            await anyio.sleep(0.01)  # it may begin later than it was waited for
    os.kill(int(said), signal.SIGKILL)


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"url": "http://127.0.0.1:1/mcp", "pid": 1e3}'])
async def test_a_file_that_makes_no_sense_is_no_hive(files: HiveFiles, said: str) -> None:
    files.run_dir.mkdir(mode=0o700)
    (files.run_dir / HIVE_FILE).write_text(said)
    assert await _hive(files, "").find() is None


async def test_a_hive_whose_process_is_gone_is_not_believed(files: HiveFiles) -> None:
    url = await _hive(files, STAND_IN).find_or_start()
    announced = files.run_dir / HIVE_FILE
    said = json.loads(announced.read_text())
    announced.write_text(json.dumps({**said, "pid": 2**22 + 1}))
    assert await _hive(files, "").find() is None, "whatever answers at its old port may be anything"
    announced.write_text(json.dumps(said))
    assert await _hive(files, "").find() == url


async def test_a_run_directory_that_others_can_write_is_refused(files: HiveFiles) -> None:
    files.run_dir.mkdir()
    files.run_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        await _hive(files, STAND_IN).find_or_start()


async def test_a_run_directory_that_is_a_link_is_refused(files: HiveFiles, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    files.run_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        await _hive(files, STAND_IN).find_or_start()


def test_the_run_directory_is_found_without_the_hosts_environment(tmp_path: Path) -> None:
    own = tmp_path / str(os.geteuid())
    own.mkdir()
    assert default_run_dir({"XDG_RUNTIME_DIR": str(own)}) == default_run_dir({}, runtime_parent=tmp_path)
    assert default_run_dir({}, runtime_parent=tmp_path / "none").is_absolute()


def test_the_hives_own_settings_decide_where_its_files_are(tmp_path: Path) -> None:
    environ = {"ASH_HUB_RUN_DIR": str(tmp_path / "r"), "ASH_HUB_STATE_DIR": str(tmp_path / "s")}
    files = HiveFiles.from_environment(environ)
    assert (files.run_dir, files.log_dir) == (tmp_path / "r", tmp_path / "s" / "log")
    assert default_state_dir({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "ash"
