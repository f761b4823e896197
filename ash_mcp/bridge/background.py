"""This user's hive: found by the URL in its run directory, or started in the background, where it exits when idle."""

from __future__ import annotations

import fcntl
import os
import select
import stat
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import anyio

from ash_mcp._protocol import parse_message
from ash_mcp.bridge.hive_http import load_httpx
from ash_mcp.errors import AshTimeout, ConfigError, ConnectFailed
from ash_mcp.paths import HIVE_FILE, default_run_dir, default_state_dir
from ash_mcp.wire import HEADER_ORIGIN, ORIGIN_HUB

__all__ = ["HiveFiles", "UserHive"]

DEFAULT_IDLE_EXIT_SECONDS: Final = 600
"""Of a hive in the background, unless the environment says otherwise."""
START_SECONDS: Final = 60.0
_PROBE_SECONDS: Final = 3.0
_POLL_SECONDS: Final = 0.05
_LOG_TAIL_BYTES: Final = 2000
_DETACH: Final = '"$@" </dev/null >>"$0" 2>&1 & echo $!'
"""Prints the hive's process id. The shell exits at once, so that the hive is reparented and outlives its starter."""


@dataclass(frozen=True, slots=True)
class HiveFiles:
    """The run directory and the log directory of this user's hive."""

    run_dir: Path
    log_dir: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> HiveFiles:
        """Return the directories that a hive with this environment would use."""
        env = os.environ if environ is None else environ
        state_dir = Path(env.get("ASH_HUB_STATE_DIR") or default_state_dir(env))
        return cls(
            run_dir=Path(env.get("ASH_HUB_RUN_DIR") or default_run_dir(env)),
            log_dir=Path(env.get("ASH_HUB_LOG_DIR") or state_dir / "log"),
        )

    @property
    def start_log(self) -> Path:
        return self.log_dir / "background.log"


def _up_command() -> tuple[str, ...]:
    return (sys.executable, "-m", "ash_mcp.cli", "up", "--port", "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserHive:
    """Finds this user's hive, or starts one.

    Args:
        command: Starts a hive in the foreground, which writes its URL into the run directory.
        environ: Variables that the hive gets on top of this process's own.
        start_seconds: How long a start may take, the wait for another process that is starting one included.
    """

    files: HiveFiles = field(default_factory=HiveFiles.from_environment)
    command: Sequence[str] = field(default_factory=_up_command)
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    start_seconds: float = START_SECONDS

    async def find(self) -> str | None:
        """Return the URL of the hive that serves now, or None."""
        url = _announced_url(self.files.run_dir)
        return url if url is not None and await _is_hive(url) else None

    async def find_or_start(self) -> str:
        """Return the URL of the hive that serves now; many callers at once start only one.

        Raises:
            ConnectFailed: The hive ended while starting; the message has the last lines of its log.
            AshTimeout: The hive did not serve in time.
            ConfigError: The run directory cannot be used, or belongs to another user.
        """
        _make_private(self.files.run_dir)
        found = await self.find()
        if found is not None:
            return found
        with anyio.move_on_after(self.start_seconds):
            async with _locked(self.files.run_dir / "start.lock"):
                return await self.find() or await self._start()
        raise AshTimeout(f"the hive did not start within {self.start_seconds:g} s. {self._log_hint()}", retryable=True)

    async def _start(self) -> str:
        _make_private(self.files.log_dir)
        pid = await self._start_detached()
        try:
            exit_descriptor = os.pidfd_open(pid)  # readable when the process has ended
        except ProcessLookupError:
            raise ConnectFailed(f"the hive could not start. {self._log_hint()}") from None
        try:
            while not select.select([exit_descriptor], [], [], 0)[0]:
                found = await self.find()
                if found is not None:
                    return found
                await anyio.sleep(_POLL_SECONDS)
        finally:
            os.close(exit_descriptor)
        # another hive may have come first, which is why this one ended
        found = await self.find()
        if found is not None:
            return found
        raise ConnectFailed(f"the hive could not start. {self._log_hint()}")

    async def _start_detached(self) -> int:
        """Start the hive as no child of this process, and return its process id."""
        environ = {"ASH_HUB_IDLE_EXIT_SECONDS": str(DEFAULT_IDLE_EXIT_SECONDS), **os.environ, **self.environ}
        environ["ASH_HUB_RUN_DIR"] = str(self.files.run_dir)
        words = ["/bin/sh", "-c", _DETACH, str(self.files.start_log), *self.command]
        run = partial(subprocess.run, words, env=environ, cwd="/", start_new_session=True, check=True)
        # by a thread: uvloop would wait for the end of the hive, which has inherited a pipe of uvloop's own
        done = await anyio.to_thread.run_sync(partial(run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
        return int(done.stdout)

    def _log_hint(self) -> str:
        log = self.files.start_log
        try:
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
                tail = file.read().decode(errors="replace").strip()
        except OSError:
            tail = ""
        said = f"Its log {log} ends:\n{tail}" if tail else f"Its log is {log}."
        return f"Run `ash doctor`, or `ash up` in a terminal, to see why. {said}"


def _announced_url(run_dir: Path) -> str | None:
    """Return the URL in the run directory if the hive that wrote it still runs, else None."""
    try:
        if not _is_private(run_dir):
            return None
        announced = parse_message((run_dir / HIVE_FILE).read_bytes()) or {}
    except OSError:
        return None
    url, pid = announced.get("url"), announced.get("pid")
    if not isinstance(url, str) or not isinstance(pid, int) or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except OSError:  # its port may be another program's by now
        return None
    return url


async def _is_hive(url: str) -> bool:
    """Ask `/healthz` and return whether a hive answers there, and not another program that has the port by now."""
    await load_httpx()
    import httpx

    health = urlsplit(url)._replace(path="/healthz", query="").geturl()
    try:
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=_PROBE_SECONDS) as client:
            response = await client.get(health)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return response.status_code == 200 and response.headers.get(HEADER_ORIGIN) == ORIGIN_HUB


def _is_private(directory: Path) -> bool:
    """Return whether a directory is this user's own and nobody else can write into it."""
    about = directory.lstat()
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o022


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        private = _is_private(directory)
    except OSError as exc:
        raise ConfigError(
            f"{directory} cannot be used: {exc.strerror}; choose others with ASH_HUB_RUN_DIR and ASH_HUB_LOG_DIR"
        ) from exc
    if not private:
        raise ConfigError(
            f"{directory} is not yours alone, so what it says of a hive cannot be believed; "
            f"run: chmod 700 {directory}, or choose others with ASH_HUB_RUN_DIR and ASH_HUB_LOG_DIR"
        )


@asynccontextmanager
async def _locked(lock_file: Path) -> AsyncGenerator[None]:
    """Hold a file lock between processes; the kernel releases it when its holder dies."""
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await anyio.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)
