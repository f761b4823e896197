"""What the local backend refuses, warns of and says, and how it starts."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import Phase
from ash_hub.backends.local import LocalBackend, LocalSettings
from ash_hub.backends.local.link import KeeperLink, KeeperRefusal
from ash_hub.backends.local.paths import hive_paths
from ash_mcp.errors import CapacityExceeded, ConfigError, ConnectFailed, StartFailed, Unsupported
from ash_mcp.types import ResourceAmounts, Resources, SandboxSpec, new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SPEC,
    WAIT_SECONDS,
    bash,
    descendants,
    directories,
    ended,
    keeper_pid,
    leftovers,
    local_backend,
    needs_isolation,
    run_inside,
    settings_in,
    stand_in,
)

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024


def fresh() -> SandboxSpec:
    return replace(SPEC, id=new_sandbox_id())


def limited(**amounts: str) -> Resources:
    return Resources(limits=ResourceAmounts(**amounts))


@needs_isolation
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"image": "own:1", "server": {"image": {"port": 3000, "path": "/mcp"}}},
            Unsupported,
            "is an image that serves MCP by itself, which the local backend does not start: choose a recipe",
        ),
        ({"image": "Python"}, (ConfigError, Unsupported), "'Python'"),
        ({"network": "everything"}, ConfigError, "'everything' is no network policy"),
        ({"network": ("code.test", "127.0.0.1")}, ConfigError, "'127.0.0.1': .* name the one port"),
        ({"runtime_class": "gvisor"}, Unsupported, "runtime class 'gvisor'"),
        ({"node_selector": {"zone": "a"}}, Unsupported, "node_selector"),
        ({"mounts": {"/recipe": "/no/such/folder"}}, ConfigError, "/no/such/folder"),
        ({"mounts": {"recipe/../..": "/usr"}}, ConfigError, "cannot be mounted"),
        ({"resources": limited(memory="plenty")}, ConfigError, "'plenty' is not an amount of memory"),
        ({"resources": limited(memory="1Mi")}, ConfigError, "at least 96Mi"),
        ({"resources": limited(cpu="fast")}, ConfigError, "'fast' is not an amount of cpu"),
        ({"resources": limited(cpu="1m")}, ConfigError, "at least 10m"),
    ],
)
async def test_what_it_cannot_do_is_refused_with_a_sentence(
    root: Path, change: dict[str, Any], error: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    async with local_backend(root) as backend:
        with pytest.raises(error, match=message):
            await backend.create(replace(fresh(), **change))
        assert await backend.list() == []


@needs_isolation
async def test_a_mount_can_be_read_and_not_written(root: Path) -> None:
    with directories() as folder:
        (folder / "server.py").write_text("served = True\n")
        folder.chmod(0o755)
        async with local_backend(root) as backend:
            created = await backend.create(replace(fresh(), mounts={"/opt/recipe": str(folder)}))
            done = await bash(created, "cat /opt/recipe/server.py; echo x >>/opt/recipe/server.py")
            assert done.out == "served = True\n" and done.code != 0


@needs_isolation
async def test_a_main_process_that_cannot_be_executed_is_a_failed_start(root: Path) -> None:
    async with local_backend(root) as backend:
        backend._runtime = replace(stand_in(), python="/usr/bin/no-such-python")  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(StartFailed, match="no-such-python") as failure:
            await backend.create(fresh())
        assert failure.value.data["step"] == "launch" and "no-such-python" in failure.value.data["log"]
        assert leftovers(settings_in(root)) == []


@needs_isolation
async def test_a_launcher_that_hangs_is_a_failed_start(root: Path) -> None:
    async with local_backend(root, start_timeout_seconds=0.2, machine=False) as backend:
        facts = backend._facts  # pyright: ignore[reportPrivateUsage]
        slow = root / "slow"
        slow.write_text("#!/bin/sh\nexec sleep 60\n")
        slow.chmod(0o755)
        backend._plans._host = replace(facts, bubblewrap=str(slow))  # pyright: ignore
        with pytest.raises(StartFailed, match=r"did not start within 0\.2 s"):
            await backend.create(fresh())
        assert leftovers(settings_in(root)) == []


@needs_isolation
async def test_there_is_a_most_of_sandboxes(root: Path) -> None:
    async with local_backend(root, max_sandboxes=1) as backend:
        first = await backend.create(fresh())
        with pytest.raises(CapacityExceeded, match="1 sandboxes run"):
            await backend.create(fresh())
        await backend.delete(first.id, grace_seconds=0)
        assert (await backend.create(fresh())).phase is Phase.RUNNING


@needs_isolation
async def test_many_requests_wait_in_the_listener_before_the_runner_accepts(root: Path) -> None:
    async with local_backend(root) as backend:
        created = await backend.create(fresh())
        answers: list[str] = []

        async def ask(number: int) -> None:
            answers.append((await run_inside(created, "echo", str(number))).out)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(ask, number)
        assert sorted(answers) == sorted(f"{number}\n" for number in range(20))


async def test_a_run_directory_with_a_long_path_is_refused(root: Path) -> None:
    settings = LocalSettings(state_dir=root / "s", run_dir=root / ("long" * 20), log_dir=root / "l")
    with pytest.raises(ConfigError, match=r"characters too long .*ASH_HUB_RUN_DIR"):
        hive_paths(settings)


async def test_a_run_directory_that_others_can_write_to_is_refused(root: Path) -> None:
    (root / "run").mkdir()
    (root / "run").chmod(0o777)
    with pytest.raises(ConfigError, match="others can write"):
        hive_paths(settings_in(root))


async def test_a_run_directory_that_is_a_link_is_refused(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "run").symlink_to(root / "elsewhere")
    with pytest.raises(ConfigError, match="is not a directory"):
        hive_paths(settings_in(root))


async def test_a_state_directory_that_cannot_be_made_is_refused(root: Path) -> None:
    (root / "state").write_text("a file")
    with pytest.raises(ConfigError, match="state"):
        hive_paths(settings_in(root))


@needs_isolation
async def test_directories_are_for_their_user_only(root: Path) -> None:
    async with local_backend(root):
        paths = hive_paths(settings_in(root))
        for path in (root / "run", root / "state", root / "log", paths.directory):
            assert path.stat().st_mode & 0o777 == 0o700
        assert paths.control.stat().st_mode & 0o777 == 0o600


async def test_a_host_without_bubblewrap_is_refused_with_what_to_install(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(root))
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        async with LocalBackend(settings_in(root), runtime=stand_in()):
            raise AssertionError("it got in")


@needs_isolation
async def test_the_keeper_and_the_launcher_show_nothing_of_a_sandbox(root: Path) -> None:
    async with local_backend(root) as backend:
        await backend.create(replace(fresh(), env={"NAME": "s3cret-of-a-recipe"}))
        keeper = keeper_pid(backend)
        for pid in (keeper, descendants(keeper)[0]):
            for name in ("cmdline", "environ"):
                try:
                    shown = await anyio.Path(f"/proc/{pid}/{name}").read_bytes()
                except PermissionError:  # a launcher that is another user's
                    continue
                assert b"s3cret" not in shown and b"PYTEST" not in shown


@needs_isolation
async def test_a_stranger_to_the_protocol_is_dropped(root: Path) -> None:
    async with local_backend(root) as backend:
        created = await backend.create(fresh())
        for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"op": "stop", "n": 1, "id": "x"}\n', b"[]\n", b""):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(hive_paths(settings_in(root)).control))
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                stranger.settimeout(WAIT_SECONDS)
                assert stranger.recv(100) == b""
        assert (await bash(created, "echo unharmed")).out == "unharmed\n"


async def test_an_unsafe_sandbox_runs_as_a_plain_process_and_says_so(root: Path) -> None:
    async with local_backend(root, unsafe=True) as backend:
        created = await backend.create(fresh())
        assert any(warning.startswith("unsafe:") for warning in created.warnings)
        assert any(warning.startswith("unsafe:") for warning in backend.describe()["warnings"])
        done = await bash(created, "pwd; echo kept >note; (setsid sleep 1000 &>/dev/null &); cat note; id -u")
        workspace = hive_paths(settings_in(root)).directory / "w" / created.id / "workspace"
        assert done.out == f"{workspace}\nkept\n{os.geteuid()}\n"
        processes = descendants(keeper_pid(backend))
        assert len(processes) >= 3
        await backend.delete(created.id)
        with anyio.fail_after(WAIT_SECONDS):
            await ended(*processes)
        assert not workspace.exists()


class Failing:
    """A keeper that fails at everything while it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.asked = anyio.Event()

    def __enter__(self) -> None:
        self._patch.setattr(KeeperLink, "request", self._request)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    async def _request(self, *_: object, **__: object) -> None:
        self.asked.set()
        raise KeeperRefusal({"kind": "fault", "message": "the keeper failed: OSError(5)"})


@needs_isolation
async def test_what_the_keeper_fails_at_can_be_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_backend(root) as backend:
        created = await backend.create(fresh())
        with Failing(monkeypatch):
            for tried in (
                backend.delete(created.id),
                backend.annotate(created.id, {"a": 1}, revision=0),
                backend.logs(created.id),
                backend.list(),
            ):
                with pytest.raises(ConnectFailed, match="now: the keeper failed") as failure:
                    await tried
                assert failure.value.retryable
        await backend.annotate(created.id, {"a": 1}, revision=0)
        await backend.delete(created.id)
        assert await backend.list() == []


@needs_isolation
async def test_a_sandbox_that_is_still_to_be_ended_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with local_backend(root) as backend:
        created = await backend.create(fresh())
        backend._unfinished_deletes.add(created.id)  # pyright: ignore[reportPrivateUsage]
        failing = Failing(monkeypatch)
        with failing, anyio.fail_after(WAIT_SECONDS):
            backend._retry_deletes()  # pyright: ignore[reportPrivateUsage]
            await failing.asked.wait()
        events = backend.watch()
        backend._retry_deletes()  # pyright: ignore[reportPrivateUsage]
        with anyio.fail_after(WAIT_SECONDS):
            event = await anext(events)
        assert event.instance is not None and (event.instance.id, event.instance.phase) == (created.id, Phase.ENDED)
