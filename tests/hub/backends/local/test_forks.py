"""Fork parents of a local hive: when sandboxes are forked, what they share, and what outlives what."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_hub.backends.local import LocalBackend
from ash_hub.backends.local.forks import fingerprint, fork_order, why_not_forked
from ash_hub.backends.local.keeper.launchers.fork import kernel, parents
from ash_hub.backends.local.keeper.launchers.fork.walls import MOST_WATCHERS
from ash_hub.backends.local.keeper.user_ranges import UserRanges
from ash_hub.backends.local.limits import limits_of
from ash_hub.backends.local.runtime import Runtime
from ash_hub.backends.local.settings import DEFAULT_FIRST_USER, USERS_EACH
from ash_mcp.errors import StartFailed
from ash_mcp.types import ResourceAmounts, Resources, new_sandbox_id
from tests.hub.backends.local.local_parts import (
    SMALL,
    SPEC,
    WAIT_SECONDS,
    bash,
    children,
    command_line,
    directories,
    ended,
    fork_parents,
    is_forker,
    keeper_pid,
    local_backend,
    needs_isolation,
    python,
    stand_in,
)

pytestmark = [pytest.mark.anyio, needs_isolation]

RANDOM = """
import ctypes, json, os, random, ssl, tempfile, uuid
ctypes.CDLL(None).prctl(4, 1)
found = [random.random(), str(uuid.uuid4()), ssl.RAND_bytes(8).hex(), next(tempfile._get_candidate_names())]
os.environ["FOUND"] = json.dumps(found)
"""
SEARCH = """
import os
found, memory = False, os.open("/proc/2/mem", os.O_RDONLY)
for line in open("/proc/2/maps"):
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    if " rw" in line:
        found = found or b"{0}" b"{1}" in os.pread(memory, end - start, start)
print(found)
"""
"""Looks for a text in the memory of the main process, which had it from a fork if another sandbox had it before."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def root(anyio_backend: str) -> AsyncIterator[Path]:
    with directories() as path:
        yield path


def runtime(load: str = "return None", before: str = "") -> Runtime:
    """Return the stand-in, with a parent that does this when it loads and a main process that does that first."""
    usual = stand_in()
    assert usual.forked is not None
    main = usual.forked.partition("\n")[2]
    text = f"import random, ssl, tempfile\ndef load(given):\n    {load}\n{main}\nusual = main\n"
    return replace(usual, forked=f"{text}def main():\n    exec({before!r}, {{}})\n    usual()")


def use(backend: LocalBackend, made: Runtime) -> None:
    backend._runtime = made  # pyright: ignore[reportPrivateUsage]
    backend._orders._runtime = made  # pyright: ignore[reportPrivateUsage]


def parent_of(backend: LocalBackend) -> tuple[int, int]:
    """Return the only helper and the parent below it."""
    (launcher,) = fork_parents(keeper_pid(backend))
    (helper,) = children(launcher)
    (parent,) = [pid for pid in children(helper) if b"fork.parent" in command_line(pid)][:1]
    return helper, parent


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


async def until_forked(backend: LocalBackend) -> None:
    with anyio.fail_after(WAIT_SECONDS):
        while SPEC.recipe not in backend.describe()["forked"]:
            await anyio.sleep(0.01)


async def test_the_first_sandbox_does_not_wait_for_a_parent_and_a_later_one_is_forked(root: Path) -> None:
    async with local_backend(root, launcher="auto", **SMALL) as backend:
        first = await backend.create(replace(SPEC, id=new_sandbox_id()))
        await until_forked(backend)
        helper, _ = parent_of(backend)
        second = await backend.create(replace(SPEC, id=new_sandbox_id()))
        # what made the walls may be ending still
        assert len([pid for pid in children(helper) if not is_forker(pid)]) == 1
        assert (await bash(first, "echo 1")).out + (await bash(second, "echo 2")).out == "1\n2\n"


async def test_a_parent_that_is_killed_is_replaced_and_its_sandboxes_live_on(root: Path) -> None:
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        box = await backend.create(replace(SPEC, id=new_sandbox_id()))
        helper, parent = parent_of(backend)
        os.kill(parent, signal.SIGKILL)
        await ended(parent)
        another = await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert (await bash(box, "echo alive")).out + (await bash(another, "echo new")).out == "alive\nnew\n"
        await backend.delete(box.id, grace_seconds=0)
        with anyio.fail_after(WAIT_SECONDS):
            await ended(helper)
        assert (await bash(another, "echo still")).out == "still\n"


async def test_when_its_helper_is_killed_its_sandboxes_have_ended_and_new_ones_start(root: Path) -> None:
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        box = await backend.create(replace(SPEC, id=new_sandbox_id()))
        helper, _ = parent_of(backend)
        os.kill(helper, signal.SIGKILL)
        with anyio.fail_after(WAIT_SECONDS):
            async for event in backend.watch():
                if event.instance is not None and event.instance.id == box.id and event.instance.exit is not None:
                    break
        another = await backend.create(replace(SPEC, id=new_sandbox_id()))
        assert (await bash(another, "echo new")).out == "new\n"


async def test_nothing_outlives_a_keeper_that_is_killed(root: Path) -> None:
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        await backend.create(replace(SPEC, id=new_sandbox_id()))
        helper, parent = parent_of(backend)
        inside = [*children(helper), parent, helper]
        os.kill(keeper_pid(backend), signal.SIGKILL)
        with anyio.fail_after(WAIT_SECONDS):
            await ended(*inside)


@pytest.mark.parametrize(
    ("load", "why"),
    [
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "threads run on"),
        ("global kept; import socket; kept = socket.socket()", "keeps descriptors open after its warm-up: socket:"),
        ("raise ValueError('no such thing')", "could not be loaded: ValueError: no such thing"),
        ("return 'it said so'", "it said so"),
    ],
)
async def test_what_cannot_be_forked_is_started_by_bubblewrap_and_says_why(root: Path, load: str, why: str) -> None:
    async with local_backend(root, launcher="auto", **SMALL) as backend:
        use(backend, runtime(load))
        for _ in range(2):
            box = await backend.create(replace(SPEC, id=new_sandbox_id()))
            assert (await bash(box, "echo fine")).out == "fine\n"
            await until_forked(backend)
        assert why in backend.describe()["forked"][SPEC.recipe]
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        use(backend, runtime(load))
        with pytest.raises(StartFailed, match="has no fork parent"):
            await backend.create(replace(SPEC, id=new_sandbox_id()))


async def test_siblings_share_no_random_state_and_none_sees_what_another_was_given(root: Path) -> None:
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        use(backend, runtime("random.random(); ssl.RAND_bytes(8); next(tempfile._get_candidate_names())", RANDOM))
        boxes = [await backend.create(replace(SPEC, id=new_sandbox_id())) for _ in range(3)]
        found = [(await python(box, "import os; print(os.environ['FOUND'])")).out for box in boxes]
        values = [value for text in found for value in text.split(", ")]
        assert len(set(values)) == 12, found
        assert (await python(boxes[2], SEARCH.format(boxes[2].id[:14], boxes[2].id[14:]))).out == "True\n"
        assert (await python(boxes[2], SEARCH.format(boxes[1].id[:14], boxes[1].id[14:]))).out == "False\n"


def test_a_caller_s_recipe_and_a_command_are_not_forked() -> None:
    made = stand_in()
    assert why_not_forked(SPEC, made) is None
    assert "came with the spawn" in str(why_not_forked(replace(SPEC, installed=False), made))
    assert "is a command" in str(why_not_forked(replace(SPEC, server={"stdio": {"command": ["x"]}}), made))


def test_a_changed_file_of_a_recipe_changes_its_fingerprint(tmp_path: Path) -> None:
    spec, made = replace(SPEC, mounts={"/opt/recipe": str(tmp_path)}), stand_in()
    (tmp_path / "tools.py").write_text("one")
    first = fingerprint(spec, made)
    assert fingerprint(spec, made) == first
    (tmp_path / "tools.py").write_text("other")
    assert fingerprint(spec, made) != first


async def test_a_recipe_whose_files_have_changed_gets_another_parent_and_its_sandboxes_live_on(root: Path) -> None:
    folder = root / "recipe"
    folder.mkdir()
    (folder / "tools.py").write_text("one")
    spec = replace(SPEC, mounts={"/opt/recipe": str(folder)})
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        first = await backend.create(replace(spec, id=new_sandbox_id()))
        helper, parent = parent_of(backend)
        (folder / "tools.py").write_text("other")
        backend._orders._known.clear()  # pyright: ignore[reportPrivateUsage] - else it is seen after two seconds
        second = await backend.create(replace(spec, id=new_sandbox_id()))
        assert first.copy_of is not None and second.copy_of not in (None, first.copy_of)
        with anyio.fail_after(WAIT_SECONDS):
            await ended(parent)
        assert (await bash(first, "echo old")).out + (await bash(second, "echo new")).out == "old\nnew\n"
        await backend.delete(first.id, grace_seconds=0)
        with anyio.fail_after(WAIT_SECONDS):
            await ended(helper)


async def test_a_parent_that_nobody_needs_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Mapping[str, Any]] = []
    monkeypatch.setattr(parents, "_CHECK_SECONDS", 0.05)
    nothing = replace(stand_in(), forked="load = lambda given: None\nmain = lambda: 1")
    made = parents.ForkParents(lambda name: None, UserRanges(), told.append)
    async with local_backend(root, **SMALL, machine=False) as backend:
        plan = backend._plans.plan(SPEC, nothing, limits_of(SPEC, backend._settings))  # pyright: ignore[reportPrivateUsage]
    order = fork_order(SPEC, nothing, plan, system_call_filter=None, group={}, idle_seconds=0.2, changes="")
    made.prepare(order)
    with anyio.fail_after(WAIT_SECONDS):
        await made.until_known(order["key"])
        assert made.find(order["key"])[0] is not None
        while made.find(order["key"])[0] is not None:
            await anyio.sleep(0.02)
        await made.cleared()
    made.end()


async def test_a_recipe_is_loaded_before_anybody_spawns_it(root: Path) -> None:
    async with local_backend(root, launcher="auto", **SMALL) as backend:
        await backend.warm(replace(SPEC, id=new_sandbox_id()))
        await until_forked(backend)
        box = await backend.create(replace(SPEC, id=new_sandbox_id(), network="internet"))
        assert box.copy_of is not None and (await bash(box, "echo forked")).out == "forked\n"


async def test_the_parent_of_machines_is_a_user_that_no_sandbox_has_and_can_do_nothing(root: Path) -> None:
    async with local_backend(root, launcher="fork", **SMALL) as backend:
        if not backend.describe()["machine"]:
            pytest.skip("this host can have no machines")
        box = await backend.create(replace(SPEC, id=new_sandbox_id()))
        _, parent = parent_of(backend)
        fields = status_of(parent)
        user = int(fields["Uid"].split()[0])
        first = int((await bash(box, "cat /proc/self/uid_map")).out.split()[1])
        assert len(set(fields["Uid"].split())) == 1 and fields["Groups"].strip() == ""
        assert user >= DEFAULT_FIRST_USER + 200 * USERS_EACH and not first <= user < first + USERS_EACH
        assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
        open_here = {os.readlink(f"/proc/{parent}/fd/{it}").split(":")[0] for it in os.listdir(f"/proc/{parent}/fd")}
        assert open_here == {"/dev/null", "pipe", "socket"}
        assert (await bash(box, "cat /proc/sys/user/max_inotify_instances")).out == f"{MOST_WATCHERS}\n"


def test_a_message_with_descriptors_waits_for_those_that_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [OSError(errno.ETOOMANYREFS, "too many"), OSError(errno.ETOOMANYREFS, "too many")]
    sent: list[bytes] = []

    def send(to: socket.socket, buffers: list[bytes], descriptors: list[int], flags: int) -> None:
        if refused:
            raise refused.pop()
        sent.extend(buffers)

    monkeypatch.setattr(socket, "send_fds", send)
    with socket.socket() as any_socket:
        kernel.send_patiently(any_socket, b"x", [])
        assert sent == [b"x"]
        refused.append(OSError(errno.EPIPE, "gone"))
        with pytest.raises(OSError, match="gone"):
            kernel.send_patiently(any_socket, b"y", [])


async def test_a_parent_has_the_memory_of_the_settings_and_not_that_of_its_first_sandbox(root: Path) -> None:
    async with local_backend(root, launcher="auto", **SMALL) as backend:
        small = Resources(limits=ResourceAmounts(memory="96Mi"))
        await backend.warm(replace(SPEC, id=new_sandbox_id(), resources=small))
        ((_, order),) = backend._orders._known.values()  # pyright: ignore[reportPrivateUsage]
        assert order["group"].get("memory_bytes", SMALL["memory_bytes"]) == SMALL["memory_bytes"]
