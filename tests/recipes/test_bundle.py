"""The runner's bundle starts where nothing of it is prepared, is the same for the same input, and says what it has."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.hub.backends.local.local_parts import needs_isolation
from tests.recipes.bundle_parts import built_bundle

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300), needs_isolation]

INSIDE: Final = "/opt/ash/bundle"
MIB: Final = 1024 * 1024
_SECONDS: Final = 60.0


@pytest.fixture(scope="module")
def bundle() -> Path:
    return built_bundle()


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "MANIFEST.json").read_text())


@contextmanager
def runner_in(bundle: Path, folder: Path, *options: str, **variables: str) -> Generator[httpx.Client]:
    """Start the bundle's runner by bubblewrap with a root that has nothing else, and give a client of it."""
    path = folder / "socket"
    manifest = json.loads((bundle / "MANIFEST.json").read_text())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        told = {"server": {"python": "ash_recipes.general.server:build"}, "workspace": "/workspace", "home": "/tmp"}
        environment = {"ASH_LISTEN_FD": str(listener.fileno()), "ASH_RUNNER_CONFIG": json.dumps(told), **variables}
        words = ["bwrap", "--unshare-all", "--die-with-parent", "--tmpfs", "/", "--ro-bind", str(bundle), INSIDE]
        words += ["--proc", "/proc", "--dev", "/dev", "--dir", "/workspace", "--dir", "/tmp", "--clearenv"]
        for name, value in (
            environment | {key: f"{INSIDE}/{at}" for key, at in manifest["environment"].items()}
        ).items():
            words += ["--setenv", name, value]
        command = [f"{INSIDE}/{word}" if "/" in word else word for word in manifest["command"]]
        runner = subprocess.Popen([*words, *options, "--remount-ro", "/", *command], pass_fds=[listener.fileno()])
    try:
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=_SECONDS
        ) as client:
            yield client
    finally:
        runner.kill()
        runner.wait()


def is_ready(client: httpx.Client) -> bool:
    while (answer := client.get("/_ash/health").json())["status"] == "starting":
        pass
    return answer["status"] == "ready"


@pytest.mark.parametrize("user", ["0", "4242"])
def test_it_starts_in_a_read_only_root_that_has_nothing(bundle: Path, folder: Path, user: str) -> None:
    with runner_in(bundle, folder, "--uid", user, "--gid", user) as client:
        assert is_ready(client)


def test_nothing_of_the_roots_loader_reaches_it(bundle: Path, folder: Path) -> None:
    libraries = folder / "libraries"
    libraries.mkdir()
    for name in ("libc.so.6", "libm.so.6", "libnss_evil.so.2", "evil.so"):
        (libraries / name).write_bytes(b"no library")
    (folder / "preload").write_text("/lib/evil.so\n")
    (folder / "nsswitch.conf").write_text("passwd: evil\nhosts: evil\n")
    (folder / "openssl.cnf").write_text(
        "openssl_conf = x\n[x]\nproviders = y\n[y]\nevil = z\n[z]\nmodule = /lib/evil.so\n"
    )
    options = ["--ro-bind", str(folder / "preload"), "/etc/ld.so.preload"]
    options += ["--ro-bind", str(folder / "nsswitch.conf"), "/etc/nsswitch.conf"]
    options += ["--ro-bind", str(folder / "openssl.cnf"), "/usr/lib/ssl/openssl.cnf"]
    for place in ("/lib", "/usr/lib/x86_64-linux-gnu", "/lib64"):
        options += ["--ro-bind", str(libraries), place]
    evil = {"PYTHONPATH": "/lib", "PYTHONHOME": "/lib", "PYTHONSTARTUP": "/lib/evil.so", "LD_LIBRARY_PATH": "/lib"}
    with runner_in(bundle, folder, *options, **evil) as client:
        assert is_ready(client)


def test_the_same_input_gives_the_same_bytes(bundle: Path, manifest: dict[str, Any], tmp_path: Path) -> None:
    again = tmp_path / "somewhere/else"
    subprocess.run([sys.executable, "-m", "ash_recipes.bundle", str(again)], check=True, cwd=tmp_path)
    its: dict[str, Any] = json.loads((again / "MANIFEST.json").read_text())
    assert [name for name, mine in zip(its["files"], manifest["files"], strict=True) if name != mine] == []
    assert its == manifest
    assert {path.lstat().st_mtime for path in again.rglob("*")} == {
        path.lstat().st_mtime for path in bundle.rglob("*")
    }
    assert len({path.lstat().st_mtime for path in again.rglob("*")}) == 1


def test_it_is_small_names_its_licences_and_no_place_of_its_builder(bundle: Path, manifest: dict[str, Any]) -> None:
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert size <= 100 * MIB
    assert [each["name"] for each in manifest["distributions"] if each["licence"] == "unknown"] == []
    assert {"fastmcp", "cryptography", "uvicorn"} <= {each["name"] for each in manifest["distributions"]}
    assert manifest["machine"] == os.uname().machine
    builder = [place.encode() for place in (sys.prefix, os.getcwd()) if place != "/usr"]
    compiled = list(bundle.rglob("*.pyc"))
    assert len(compiled) > 1000
    assert [path for path in compiled if any(place in path.read_bytes() for place in builder)] == []
