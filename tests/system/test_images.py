"""Sandboxes from images that nobody prepared: what they show, and what their commands get that no runner does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from ash_hub.backends.local import host
from ash_mcp import Hive
from ash_mcp.errors import CommandNotStarted, ConfigError, Conflict, FileNotPermitted, StartFailed
from tests.hive_process import ASH, hive_in
from tests.hub.backends.local.machine_parts import needs_machines
from tests.hub.images.image_parts import entry, layer, layout, needs_root, programs
from tests.recipes.bundle_parts import TEST_IMAGES, built_bundle

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, pytest.mark.timeout(300), needs_root, needs_machines]

PASSWD: Final = "root:x:0:0:root:/root:/bin/bash\njoe:x:1000:1001:Joe:/home/joe:/bin/bash\n"
GROUP: Final = "root:x:0:\njoe:x:1001:\nmore:x:2000:joe\n"
TOOLS: Final = ("bash", "sleep", "cat", "id", "ls", "mv", "rm", "stat", "touch", "env")
HOSTILE: Final = {
    "PATH": "/opt/tools:/usr/bin",
    "LD_PRELOAD": "/evil.so",
    "LD_LIBRARY_PATH": "/evil",
    "PYTHONPATH": "/evil",
    "PYTHONHOME": "/evil",
    "OPENSSL_CONF": "/evil",
    "ASH_RUNNER_CONFIG": "{}",
    "ASH_LISTEN": "0.0.0.0:1",
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def ash(*words: str) -> dict[str, Any]:
    done = subprocess.run([*ASH, *words, "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


class Images:
    """Imports images under names of this process, and removes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: list[str] = []

    def add(self, name: str, *layers: bytes, **config: Any) -> str:
        full = f"test/{name}:p{os.getpid()}"
        told = ash("image", "import", str(layout(self._folder / name, *layers, **config)), full)
        assert told["name"] == full
        self._names.append(full)
        return full

    def remove(self) -> Sequence[str]:
        return ash("image", "remove", *self._names)["removed"] if self._names else []


@contextmanager
def imported_images(folder: Path) -> Generator[Images]:
    """Have hives and `ash` use the tests' own images, and remove at the end those that were added."""
    built_bundle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASH_HUB_BACKEND__IMAGE_DIR", str(TEST_IMAGES))
        made = Images(folder)
        yield made
        made.remove()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Generator[Images]:
    with imported_images(tmp_path_factory.mktemp("images")) as made:
        yield made


@pytest.fixture(scope="module")
def usual(images: Images) -> str:
    """An image of two layers that does all that an image can do to what starts in it."""
    below = layer(
        *programs(*TOOLS),
        entry("etc/passwd", PASSWD),
        entry("etc/group", GROUP),
        entry("etc/ld.so.preload", "/evil.so\n"),
        entry("home/joe", uid=1000, gid=1001),
        entry("root", mode=0o700),
        entry("root/own", "of root"),
        entry("srv/app", uid=1000, gid=1001),
        entry("srv/app/old", "old"),
        entry("srv/app/gone", "gone"),
        entry("srv/hidden/file", "hidden"),
        entry("first", "linked"),
        entry("second", type=tarfile.LNKTYPE, linkname="first"),
    )
    above = layer(entry("srv/app/.wh.gone", ""), entry("srv/hidden/.wh..wh..opq", ""), entry("srv/hidden/new", "1"))
    env = [f"{name}={value}" for name, value in HOSTILE.items()]
    return images.add("usual", below, above, Env=env, User="joe", WorkingDir="/srv/app", Entrypoint=["/no/such"])


@pytest.fixture(scope="module")
def url(images: Images) -> Generator[str]:
    folder = Path("/tmp") / f"ash-images-{os.getpid()}"  # a socket's path must be short
    with hive_in(folder) as (url, _):
        yield url
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
async def hive(anyio_backend: str, url: str) -> AsyncGenerator[Hive]:
    async with Hive(url) as hive:
        yield hive


async def test_commands_get_what_the_image_says_and_the_runner_nothing_of_it(hive: Hive, usual: str) -> None:
    async with await hive.spawn("general", image=usual) as box:
        who = await box.exec("id -u; id -g; id -G; pwd; echo $HOME")
        assert who.stdout.split() == ["1000", "1001", "1001", "2000", "/srv/app", "/home/joe"]
        assert "/evil.so" in who.stderr, "the loader of the image's programs tells that there is no such library"
        lines = (await box.exec(["env"])).stdout.splitlines()
        assert {f"{name}={value}" for name, value in HOSTILE.items()} <= set(lines)
        assert not [line for line in lines if "/opt/ash" in line or "public_key" in line]
        asking = "exec 3<>/dev/tcp/127.0.0.1/3128; printf 'GET http://127.0.0.1:1/ HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
        assert "HTTP/1.1 403" in (await box.exec(asking)).stdout, "the way out is there for a user who is not root"
        told = await box.call("terminal-controller_execute_command", command="cd /srv; touch x; pwd; id -u")
        assert told.structured is not None and told.structured["stdout"] == "/srv\n1000\n"
        root = await box.exec("id -u; cat /root/own; echo $HOME", user="root")
        assert root.stdout == "0\nof root/root\n"


async def test_files_are_those_of_all_layers(hive: Hive, usual: str) -> None:
    async with await hive.spawn("general", image=usual) as box:
        await box.files.write("made/here", "text")
        assert (await box.exec("stat -c %u:%g made made/here")).stdout == "1000:1001\n1000:1001\n"
        with pytest.raises(FileNotPermitted):
            await box.files.read("/root/own")
        await box.files.remove("made", recursive=True)
        seen = await box.exec("ls /srv/app /srv/hidden; cat /first; stat -c %h:%u:%g /second /srv/app")
        assert seen.stdout.split() == ["/srv/app:", "old", "/srv/hidden:", "new", "linked2:0:0", "1:1000:1001"]
        assert await box.files.read("old") == "old", "a relative path begins at the image's working directory"


async def test_writes_stay_in_the_sandbox(hive: Hive, usual: str) -> None:
    async with await hive.spawn("general", image=usual) as one, await hive.spawn("general", image=usual) as other:
        await one.exec("echo mine > old; rm /first; mv /usr/bin/touch /usr/bin/t", user="root", check=True)
        assert (await one.exec("cat old; ls /first /usr/bin/t")).stdout == "mine\n/usr/bin/t\n"
        assert (await other.exec("cat old /first; ls /usr/bin/touch")).stdout == "oldlinked/usr/bin/touch\n"
        denied = await one.exec("ls /opt/ash/bundle; echo x > /opt/ash/x; mv /opt/ash /opt/other", user="root")
        assert "Read-only" in denied.stderr and "busy" in denied.stderr.lower()


async def test_an_image_without_a_shell_runs_programs(hive: Hive, images: Images) -> None:
    name = images.add("bare", layer(*programs("id")))
    async with await hive.spawn("general", image=name) as box:
        assert (await box.exec(["/usr/bin/id", "-u"])).stdout == "0\n"
        with pytest.raises(CommandNotStarted, match="no shell in this sandbox: give the command as a list"):
            await box.exec("id")
        await box.files.write("made", "text")
        assert await box.files.read("/workspace/made") == "text"


async def test_a_sandbox_goes_back_to_a_snapshot_of_its_image_alone(hive: Hive, usual: str, images: Images) -> None:
    if (why := host.snapshot_problem(0x7000_0000)) is not None:
        pytest.skip(why)
    other = images.add("other", layer(*programs("bash")))
    async with await hive.spawn("general", image=usual) as box:
        await box.exec("echo 1 > kept", check=True)
        snapshot = await box.snapshot()
        await box.exec("rm kept old", check=True)
        await box.reset(snapshot)
        assert (await box.exec("ls; id -u")).stdout.split() == ["kept", "old", "1000"]
        async with await hive.spawn("general", image=usual, snapshot=snapshot) as sibling:
            assert (await sibling.exec("ls")).stdout.split() == ["kept", "old"]
        with pytest.raises(Conflict, match="another image"):
            await hive.spawn("general", image=other, snapshot=snapshot)


async def test_what_cannot_be_started_says_why(hive: Hive, images: Images) -> None:
    with pytest.raises(ConfigError, match="no image 'nowhere' on this host: `ash image import"):
        await hive.spawn("general", image="nowhere")
    leads_away = images.add("away", layer(*programs("bash"), entry("opt", type=tarfile.SYMTYPE, linkname="/etc")))
    with pytest.raises(StartFailed, match="'opt' of /opt is no directory"):
        await hive.spawn("general", image=leads_away)
    nobody = images.add("nobody", layer(*programs("bash")), User="nobody-there")
    with pytest.raises(StartFailed, match="'nobody-there', whom its /etc/passwd does not have"):
        await hive.spawn("general", image=nobody)


def test_images_are_listed_and_removed(images: Images, usual: str) -> None:
    (found,) = (each for each in ash("image", "list")["images"] if each["name"] == usual)
    assert (found["layers"], found["config"]["user"], found["origin"]) == (2, "joe", "archive")
