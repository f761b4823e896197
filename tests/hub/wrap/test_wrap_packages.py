"""Packages of npx and uvx under `ash wrap`, from registries of this host that are made for the test."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import tarfile
import threading
import zipfile
from base64 import b64encode
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import pytest

from ash_hub.wrap import packages
from ash_hub.wrap.packages import Package, installed
from ash_mcp.errors import ConfigError
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.wrap.wrap_parts import wrapped

NPM_SERVER = """#!/usr/bin/env node
const net = require("net");
try { require("fs").writeFileSync(__filename, "x"); console.log("written"); } catch (e) { console.log(e.code); }
console.log(process.argv.slice(2).join(), process.env.TOKEN, require("./made.json").home);
net.connect(PORT, "127.0.0.1").on("error", (e) => console.log(e.code)).on("connect", () => console.log("reached"));
"""
NPM_SCRIPT = """
require("fs").writeFileSync("made.json", JSON.stringify({home: process.env.TOKEN || "nothing"}));
"""


def npm_files(port: int) -> dict[str, bytes]:
    """Return what a registry answers for one package, by path."""
    package = {
        "name": "@test/server",
        "version": "1.0.0",
        "bin": {"server": "server.js"},
        "scripts": {"postinstall": "node install.js"},
    }
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in (
            ("package.json", json.dumps(package)),
            ("server.js", NPM_SERVER.replace("PORT", str(port))),
            ("install.js", NPM_SCRIPT),
        ):
            member = tarfile.TarInfo(f"package/{name}")
            member.size, member.mode = len(text), 0o755
            archive.addfile(member, io.BytesIO(text.encode()))
    data = content.getvalue()
    integrity = "sha512-" + b64encode(hashlib.sha512(data).digest()).decode()
    tarball = {"tarball": "http://localhost/server-1.0.0.tgz", "integrity": integrity}
    versions = {"1.0.0": {**package, "dist": tarball, "hasInstallScript": True}}
    listed = {"name": "@test/server", "dist-tags": {"latest": "1.0.0"}, "versions": versions}
    return {"/@test%2fserver": json.dumps(listed).encode(), "/server-1.0.0.tgz": data}


def python_files() -> dict[str, bytes]:
    """Return what an index answers for one wheel, by path."""
    program = "import os, sys\ndef main():\n    print(sys.argv[1:], os.environ.get('TOKEN'))\n    sys.exit(4)\n"
    content = io.BytesIO()
    about = "test_server-1.0.dist-info"
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr("test_server.py", program)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: test-server\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/entry_points.txt", "[console_scripts]\ntest-server = test_server:main\n")
        wheel.writestr(f"{about}/RECORD", "")
    name = "test_server-1.0-py3-none-any.whl"
    return {"/simple/test-server/": f'<a href="/{name}">{name}</a>'.encode(), f"/{name}": content.getvalue()}


def _npm_made(programs: dict[str, str] | str) -> dict[str, str]:
    names: Iterable[str] = ["x"] if isinstance(programs, str) else programs
    return {
        "package.json": '{"dependencies": {"x": "^1"}}',
        "node_modules/x/package.json": json.dumps({"bin": programs}),
        **{f"node_modules/.bin/{name}": "" for name in names},
    }


@contextmanager
def registry(kind: str) -> Generator[tuple[int, list[str]]]:
    """Serve a package on this host's loopback; yield the port and what was asked for."""
    asked: list[str] = []
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = files.get(self.path)
            self.send_response(200 if data is not None else 404)
            self.send_header("content-type", "text/html" if self.path.startswith("/simple") else "application/json")
            self.send_header("content-length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
        files.update(npm_files(port) if kind == "npm" else python_files())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield port, asked
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("package", "made", "command"),
    [
        (Package("pypi", ("one",), "one", ()), {"bin/one": "", "bin/pip": ""}, "bin/one"),
        (Package("pypi", ("one",), "two", ()), {"bin/one": "", "bin/pip": ""}, "has no program two: it has one;"),
        (Package("npm", ("x@1",), None, ()), _npm_made({"tool": "a", "x": "b"}), "node_modules/.bin/x"),
        (Package("npm", ("x@1",), None, ()), _npm_made("a.js"), "node_modules/.bin/x"),
        (
            Package("npm", ("x@1",), None, ()),
            _npm_made({"a": "a", "b": "b"}),
            "has no program of its name: it has a, b;",
        ),
        (Package("npm", ("x@1",), "../../etc", ()), _npm_made("a.js"), "has no program ../../etc"),
        (Package("npm", ("x@1",), None, ()), {}, "it has none;"),
        (Package("npm", ("x@1",), None, ()), None, "x@1 could not be installed"),
    ],
)
def test_the_program_of_a_package_is_found_and_a_failure_leaves_nothing(
    tmp_path: Path, package: Package, made: dict[str, str] | None, command: str
) -> None:
    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        assert exceeded() is None
        for path, text in (made or {}).items():
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            (files / path).write_text(text)
        return 0 if made is not None else 1

    opened = installed(package, parent=tmp_path, made_of="", refresh=False, install=install)
    if command.startswith(("bin/", "node_modules/")):
        with opened as (files, found):
            assert found == command and Path(files, found).exists()
    else:
        with pytest.raises(ConfigError, match=re.escape(command)), opened:
            pass
        assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_package_never_names_a_file_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"dependencies": {"x": "1"}}')

    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        del exceeded
        (files / "package.json").symlink_to(tmp_path / "package.json")
        return 0

    opened = installed(Package("npm", ("x",), None, ()), parent=tmp_path, made_of="", refresh=False, install=install)
    with pytest.raises(ConfigError, match="of its name"), opened:
        pass


@pytest.mark.parametrize("text", ['{"dependencies": ["x"]}', '{"dependencies": 3}', "[" * 100_000, None])
def test_what_a_package_says_of_itself_may_be_anything(tmp_path: Path, text: str | None) -> None:
    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        del exceeded
        if text is None:
            os.mkfifo(files / "package.json")
        else:
            (files / "package.json").write_text(text)
        return 0

    opened = installed(Package("npm", ("x",), None, ()), parent=tmp_path, made_of="", refresh=False, install=install)
    with pytest.raises(ConfigError, match="of its name"), opened:
        pass


def test_a_program_of_no_shape_is_none(tmp_path: Path) -> None:
    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        del exceeded
        for path, content in {**_npm_made("a.js"), "node_modules/x/package.json": '{"bin": 7}'}.items():
            (files / path).parent.mkdir(parents=True, exist_ok=True)
            (files / path).write_text(content)
        return 0

    opened = installed(Package("npm", ("x",), None, ()), parent=tmp_path, made_of="", refresh=False, install=install)
    with pytest.raises(ConfigError, match="of its name"), opened:
        pass


def test_a_package_that_nobody_used_for_a_month_goes_with_the_next_installation(tmp_path: Path) -> None:
    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        del exceeded
        (files / "bin").mkdir()
        (files / "bin/one").touch()
        return 0

    places: list[Path] = []
    for number in range(4):
        package = Package("pypi", (f"one=={number}",), "one", ())
        with installed(package, parent=tmp_path, made_of="", refresh=False, install=install) as (files, _):
            places.append(Path(files).parent)
        if number in (0, 2):
            os.utime(places[-1], (1, 1))
    assert [place.exists() for place in places] == [False, True, False, True]


def _empty_files(files: Path) -> None:
    for number in range(101):
        (files / f"f{number}").touch()


def _below_long_names(files: Path) -> None:
    """Make a file that no path of the host leads to."""
    here = os.open(files, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=here)
        there = os.open("n" * 250, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = there
    with open(os.open("large", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 101 * 4096)
    os.close(here)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every directory")
def test_a_directory_that_cannot_be_read_ends_an_installation(tmp_path: Path) -> None:
    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        (files / "hidden").mkdir(mode=0o300)
        said = exceeded()
        (files / "hidden").chmod(0o700)
        assert said is not None and "cannot be looked into" in said
        return 1

    opened = installed(Package("npm", ("x",), None, ()), parent=tmp_path, made_of="", refresh=False, install=install)
    with pytest.raises(ConfigError, match="exit code 1"), opened:
        pass


@pytest.mark.parametrize("make", [_empty_files, _below_long_names])
def test_what_a_package_takes_is_bounded_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(packages, "_MOST_BYTES", 100 * 4096)
    said: list[str | None] = []

    def install(files: Path, exceeded: Callable[[], str | None]) -> int:
        make(files)
        said.append(exceeded())
        return 1

    opened = installed(Package("npm", ("x",), None, ()), parent=tmp_path, made_of="", refresh=False, install=install)
    with pytest.raises(ConfigError, match="exit code 1"), opened:
        pass
    assert said == ["the installation took more than 0 GiB"]
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@needs_isolation
@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_a_package_of_npm_is_installed_without_secrets_and_serves_without_network(tmp_path: Path) -> None:
    with registry("npm") as (port, asked):
        own = {
            "XDG_CACHE_HOME": str(tmp_path),
            "npm_config_registry": f"http://127.0.0.1:{port}/",
            "TOKEN": "hush",
        }
        words = ("--env", "TOKEN", "--", "npx", "-y", "@test/server", "a", "b")
        done = wrapped(*words, env=own)
        assert done.stdout.decode().splitlines() == ["EROFS", "a,b hush nothing", "ECONNREFUSED"], done.stderr.decode()
        assert b"installing @test/server (npm)" in done.stderr and len(asked) >= 2
        before = len(asked)
        again = wrapped(*words, env=own)
        assert (again.stdout, again.stderr, len(asked)) == (done.stdout, b"", before)
        wrapped("--refresh", *words, env=own)
        assert len(asked) > before
    names = os.listdir(tmp_path / "ash" / "wrap" / "packages")
    assert len([name for name in names if not name.startswith(".") and not name.endswith(".lock")]) == 1


@needs_isolation
@pytest.mark.heavy
def test_a_package_of_pypi_is_installed_and_started(tmp_path: Path) -> None:
    with registry("pypi") as (port, _):
        own = {
            "XDG_CACHE_HOME": str(tmp_path),
            "PIP_INDEX_URL": f"http://u:p@localhost:{port}/simple",
            "TOKEN": "hush",
        }
        done = wrapped("--", "uvx", "test-server", "x", env=own)
        assert (done.returncode, done.stdout) == (4, b"['x'] None\n"), done.stderr.decode()
    assert not list((tmp_path / "ash" / "wrap" / "packages").glob(".*"))
