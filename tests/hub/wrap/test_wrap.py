"""A wrapped command: its bytes, its end, and what it sees of the host."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ash_hub.cli.wrap import app
from tests.hub.backends.local.local_parts import needs_isolation
from tests.hub.wrap.wrap_parts import WAIT_SECONDS, processes_with, running, until, words_of, wrapped

pytestmark = needs_isolation
SYSTEM = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def test_bytes_pass_as_they_are_and_the_end_of_stdin_too() -> None:
    data = os.urandom(700_000)
    done = wrapped("--", "cat", data=data)
    assert (done.returncode, done.stdout == data, done.stderr) == (0, True, b"")


def test_the_exit_code_and_stderr_are_the_servers() -> None:
    done = wrapped("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    missing = wrapped("--", "no-such-program")
    assert missing.returncode == 127 and b"there is no program no-such-program" in missing.stderr


def test_a_signal_reaches_the_server_which_may_end_as_it_likes() -> None:
    with running("sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done") as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_SECONDS) == 5


def test_nothing_is_left_when_it_is_killed() -> None:
    mark = f"{os.getpid()}.25"
    with running("sh", "-c", f"sleep {mark} & echo up; exec sleep {mark}") as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert processes_with(mark)
        process.kill()
        assert until(lambda: not processes_with(mark))


@pytest.mark.heavy
def test_nothing_is_left_when_its_host_is_killed_though_the_server_ignores_everything() -> None:
    mark = f"{os.getpid()}.75"
    server = f"trap '' TERM HUP INT; echo up; while :; do sleep {mark}; done"
    host = f"""
import subprocess, sys, time
child = subprocess.Popen({words_of([], "sh", "-c", server)!r}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline(), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", host], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        own, line = process.stdout.readline().split()
        assert line == b"b'up\\n'" and until(lambda: bool(processes_with(mark)))
        process.kill()
        assert until(lambda: not processes_with(mark) and not Path(f"/proc/{int(own)}").exists())


def test_a_client_that_only_closes_stdin_gets_every_answer() -> None:
    done = wrapped("sh", "-c", "cat >/dev/null; sleep 0.5; echo late")
    assert (done.returncode, done.stdout) == (0, b"late\n")


HOSTILE = """
import os, pathlib, socket
for path in os.environ["LOOK"].split(":"):
    try:
        print("seen", path, sorted(os.listdir(path)) if os.path.isdir(path) else open(path).read())
    except OSError as error:
        print("unseen", path)
print("processes", len([name for name in os.listdir("/proc") if name.isdigit()]))
for address in (("127.0.0.1", int(os.environ["PORT"])), ("1.1.1.1", 443)):
    try:
        socket.create_connection(address, 2)
        print("reached", address)
    except OSError:
        print("refused", address)
print("hush" in str(dict(os.environ)), os.environ["GIVEN"])
for path in ("/proc/1/environ", "/proc/1/root/root", "/proc/1/fd/0"):
    try:
        os.open(path, os.O_RDONLY)
        print("opened", path)
    except OSError:
        pass
print("streams", [os.readlink(f"/proc/self/fd/{n}").partition(":")[0] for n in (0, 1, 2)])
print("descriptors", [n for n in os.listdir("/proc/self/fd") if int(n) > 3])
"""


def test_a_hostile_server_finds_nothing_of_its_user(tmp_path: Path) -> None:
    secret = tmp_path / "bait.txt"
    secret.write_text("bait")
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as bait:
        look = f"{secret}:{home}:{home}/.ssh:{Path.home()}/.cache:/etc/shadow:/etc/machine-id:{Path(__file__).parent}"
        done = wrapped(
            *("--env", "GIVEN", "--env", f"LOOK={look}", "--env", f"PORT={bait.server_address[1]}"),
            *("--", "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable, "-c", HOSTILE),
            env={"SECRET": "hush-hush", "GIVEN": "given"},
        )
    said = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert "seen" not in said.replace("unseen", "") and said.count("unseen") == 7
    assert "reached" not in said and said.count("refused") == 2
    assert "False given" in said and "opened" not in said
    assert "processes 2\n" in said  # the first one and the server
    assert "streams ['pipe', 'pipe', 'pipe']" in said and "descriptors []" in said


def test_a_folder_is_read_only_unless_it_says_rw(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "other").mkdir()
    script = f"cat {tmp_path}/file; echo new >{tmp_path}/file; touch {tmp_path}/made; pwd; touch /usr/x /x"
    done = wrapped("--folder", str(tmp_path), "sh", "-c", script, cwd=tmp_path)
    assert done.stdout == f"old{tmp_path}\n".encode() and (tmp_path / "file").read_text() == "old"
    assert done.stderr.count(b"Read-only file system") == 4 and not (tmp_path / "made").exists()
    done = wrapped("--folder", f"{tmp_path}:rw", "sh", "-c", script)
    assert (tmp_path / "file").read_text() == "new\n" and (tmp_path / "made").exists()
    assert done.stdout == b"old/workspace\n" and (tmp_path / "made").stat().st_uid == os.geteuid()


FETCH = """
import urllib.request
for url in __import__("sys").argv[1:]:
    try:
        print(urllib.request.urlopen(url, timeout=10).status)
    except OSError as error:
        print(error)
"""


class _Empty(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_what_the_policy_names_is_reached_and_the_rest_is_refused_and_told() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        urls = (f"http://api.test:{port}/", "http://elsewhere.test/")
        options = ("--network", f"api.test=127.0.0.1:{port},example.com")
        done = wrapped(*options, "--", "python3", "-I", "-c", FETCH, *urls, env=SYSTEM)
        server.shutdown()
    assert done.stdout.decode().splitlines() == [
        "204",
        "HTTP Error 403: Forbidden (egress refused: not_listed; policy: " + f"api.test=127.0.0.1:{port}, example.com)",
    ]
    assert b"network: elsewhere.test:80 was refused" in done.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "name the server's command line"),
        (("--folder", "/nowhere", "true"), "there is no /nowhere here"),
        (("--folder", "/", "true"), "would show the whole host"),
        (("--env", "NOT_SET_HERE", "true"), "NOT_SET_HERE is not set here"),
        (("--network", "everything", "--network", "!", "true"), "--network: "),
        (("--memory", "lots", "true"), "is not an amount of memory"),
        (("--memory", "1Mi", "true"), "say 64Mi at least"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_do(words: tuple[str, ...], why: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_a_server_that_takes_too_much_memory_is_ended_or_refused() -> None:
    done = wrapped(
        "--memory", "128Mi", "--", "python3", "-I", "-c", "x = b'1' * (400 << 20); print(len(x))", env=SYSTEM
    )
    assert done.returncode != 0 and done.stdout == b""
    assert b"it took more memory" in done.stderr or b"MemoryError" in done.stderr


def test_streams_may_be_files_and_nothing_of_them_gets_inside(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("hello\n")
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as target:
        words = words_of([], "sh", "-c", "cat; readlink /proc/self/fd/1")
        subprocess.run(words, check=True, timeout=60, stdin=source, stdout=target)
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "hello" and lines[1].startswith("pipe:")
