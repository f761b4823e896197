"""Images that nobody prepared, one by one: tools, commands and files in each, or a typed reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

import pytest

from ash_mcp.sync import Hive
from tests.hive_process import hive_in
from tests.hub.backends.local.machine_parts import needs_machines
from tests.hub.images.image_parts import Entry, entry, layer, needs_root, programs
from tests.system.test_images import Images, imported_images

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600), needs_root, needs_machines]

ROOT: Final = Path(__file__).parents[2]
MIB: Final = 1024 * 1024
SHELL: Final = ("bash", "cat", "ls", "id")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Generator[Images]:
    with imported_images(tmp_path_factory.mktemp("images")) as made:
        yield made


@pytest.fixture(scope="module")
def hive(images: Images) -> Generator[Hive]:
    folder = Path("/tmp") / f"ash-table-{os.getpid()}"  # a socket's path must be short
    with hive_in(folder) as (url, _), Hive(url) as hive:
        yield hive
    shutil.rmtree(folder)


def small(*more: Entry) -> bytes:
    return layer(*programs(*SHELL), *more)


def busybox(folder: Path) -> bytes:
    """Return a layer with nothing but Debian's busybox, which needs no library."""
    try:
        subprocess.run(["apt-get", "download", "busybox-static"], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mirror gives busybox-static here")
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder / "x"], check=True)
    program = next(path for path in (folder / "x/bin/busybox", folder / "x/usr/bin/busybox") if path.is_file())
    return layer(
        entry("bin/busybox", program.read_bytes(), mode=0o755),
        *(entry(f"bin/{name}", type=tarfile.SYMTYPE, linkname="busybox") for name in ("sh", "cat", "ls", "id")),
    )


def debian(folder: Path) -> bytes:
    """Return the layer of a whole Debian, as `scripts/images --rootfs` has made it."""
    found = sorted((ROOT / ".cache/images").glob("debian-*"))
    if not found:
        pytest.skip("there is no .cache/images/debian-*: `scripts/images --rootfs DIRECTORY` makes one")
    words = ["tar", "-C", str(found[-1]), "--numeric-owner", "-c", "."]
    return subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout


TABLE: Final[dict[str, tuple[Callable[[Path], list[bytes]], dict[str, object], str]]] = {
    "scratch and busybox": (lambda folder: [busybox(folder)], {}, "0"),
    "busybox as a number": (lambda folder: [busybox(folder)], {"User": "4242:4243", "Env": ["PATH=/bin"]}, "4242"),
    "debootstrap": (lambda folder: [debian(folder)], {"Cmd": ["bash"]}, "0"),
    "debootstrap with nobody": (lambda folder: [debian(folder)], {"User": "nobody"}, "65534"),
    "a directory that is not there": (lambda _: [small()], {"WorkingDir": "/deep/er"}, "0"),
    "many layers": (lambda _: [small(), *(layer(entry(f"l{n}", str(n))) for n in range(120))], {}, "0"),
    "a huge layer": (lambda _: [small(entry("zeros", bytes(300 * MIB)))], {}, "0"),
    "many small files": (lambda _: [small(*(entry(f"f/{n}", "x") for n in range(20_000)))], {}, "0"),
    "an odd entry point": (lambda _: [small()], {"Entrypoint": ["/bin/false"], "Cmd": ["x"]}, "0"),
    "a whole layer deleted": (lambda _: [layer(entry("gone", "1")), small(entry(".wh.gone", ""))], {}, "0"),
    "own python": (
        lambda _: [small(entry("usr/lib/python3/os.py", "raise SystemExit(7)"), entry("sitecustomize.py", "1/0"))],
        {"Env": ["PYTHONHOME=/usr", "PYTHONPATH=/", "PATH=/usr/bin"]},
        "0",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_tools_commands_and_files_work(hive: Hive, images: Images, tmp_path: Path, name: str) -> None:
    make, config, user = TABLE[name]
    image = images.add(name.replace(" ", "-"), *make(tmp_path), **config)
    with hive.spawn("general", image=image) as box:
        assert len(box.tools()) > 5
        assert box.exec("id -u").stdout.strip() == user
        box.files.write("made", "by the file tools")
        assert box.exec("cat made").stdout == "by the file tools"
        assert box.exec("echo by a command > also", check=True).exit_code == 0
        assert box.files.read("also") == "by a command\n"
        told = box.call("terminal-controller_execute_command", command="echo from a terminal")
        assert told.structured is not None and told.structured["stdout"] == "from a terminal\n"
        if name == "many layers":
            assert box.exec("cat /l0 /l119").stdout == "0119"
