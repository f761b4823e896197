"""Parts of the tests that kill a hive: `ash up` on directories that outlive it, and what is left of it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ash_hub.backends.local import LocalSettings
from ash_hub.backends.local.paths import hive_paths
from ash_mcp.errors import ConfigError
from tests.hive_process import ASH
from tests.hub.backends.local.local_parts import hive_groups, leftovers

START_SECONDS = 60


@dataclass
class Home:
    """Directories of one hive, and its hubs one after the other."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    hubs: list[subprocess.Popen[str]] = field(default_factory=list["subprocess.Popen[str]"])

    @property
    def settings(self) -> LocalSettings:
        state = self.folder / "state"
        return LocalSettings(
            state_dir=state, run_dir=self.folder / "run", log_dir=state / "log", launcher="bubblewrap"
        )

    def start(self, *before: str, seconds: float = START_SECONDS) -> str:
        """Start a hub, with words before its command, and return its URL once it serves."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ASH_")}
        own = {"ASH_HUB_STATE_DIR": str(self.folder / "state"), "ASH_HUB_RUN_DIR": str(self.folder / "run")}
        with (self.folder / "stderr").open("ab") as stderr:
            hub = subprocess.Popen(
                (*before, *ASH, "up", "--port", "0"),
                env={**clean, **own, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.hubs.append(hub)
        assert hub.stdout is not None
        ready = select.select([hub.stdout], [], [], seconds)[0]
        line = hub.stdout.readline() if ready else ""
        assert line.startswith("Ash serves at "), f"the hub says {line!r}: {self.said()[-2000:]}"
        return line.rpartition(" ")[2].strip()

    def said(self) -> str:
        """Return what the hubs wrote to stderr."""
        return (self.folder / "stderr").read_text()

    def kill_hub(self) -> None:
        hub = self.hubs.pop()
        hub.kill()
        hub.communicate()

    def stop_hub(self) -> int:
        """End the hub gracefully and return its exit code."""
        hub = self.hubs.pop()
        hub.terminate()
        hub.communicate(timeout=START_SECONDS)
        return hub.returncode

    def keeper(self) -> int | None:
        """Return the process that owns the sandboxes: its working directory is the hive's."""
        try:
            directory = str(hive_paths(self.settings).directory)
        except ConfigError:
            return None  # without directories there is none
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if os.readlink(link) == directory:
                    return int(link.parent.name)
            except OSError:
                continue  # it has ended meanwhile
        return None

    def known_keeper(self) -> int:
        keeper = self.keeper()
        assert keeper is not None, "no keeper runs"
        return keeper

    def remains(self) -> list[str]:
        """Name what is there of keeper and sandboxes: processes, sockets, directories, groups, mounts."""
        keeper = self.keeper()
        found = [] if keeper is None else [f"keeper {keeper}"]
        directory = hive_paths(self.settings).directory
        found += [str(directory)] if directory.exists() else []
        found += leftovers(self.settings) + [str(group) for group in hive_groups(self.settings)]
        found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.folder) in line]
        return found


@contextmanager
def home(**environment: str) -> Generator[Home]:
    """Give directories for a hive; at the end its hub and its keeper are ended and the directories removed."""
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))  # a socket's path must be short
    made = Home(folder, environment)
    try:
        yield made
    finally:
        for hub in made.hubs:
            hub.kill()
            hub.communicate()
        keeper = made.keeper()
        if keeper is not None:
            os.kill(keeper, signal.SIGTERM)
            gone_within(10, lambda: made.keeper() is None)
        shutil.rmtree(folder)


def gone_within(seconds: float, nothing_left: Callable[[], bool]) -> bool:
    """Look until something is gone, for at most so long."""
    deadline = time.monotonic() + seconds
    while not nothing_left():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
