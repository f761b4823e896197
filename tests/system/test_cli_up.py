"""`ash up` and `ash doctor`: a hive that starts, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from ash_hub.backends.checks import Check
from ash_mcp.cli import main

ASH: Final = (sys.executable, "-m", "ash_mcp.cli")
SECONDS: Final = 60


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directories of its own for a hive; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ash-", dir="/tmp"))
    for name in [name for name in os.environ if name.startswith("ASH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ASH_HUB_STATE_DIR", str(folder / "state"))
    monkeypatch.setenv("ASH_HUB_RUN_DIR", str(folder / "run"))
    yield folder
    shutil.rmtree(folder)


def ash(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(words)
    out, err = capfd.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def family(home: Path) -> set[int]:
    """Return the keeper of the hive that has its directories at `home`, and all that descends from it."""
    parents: dict[int, int] = {}
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cwd").resolve().is_relative_to(home):
                found.add(int(folder.name))
        except OSError:
            continue  # it has ended meanwhile
    size = 0
    while size != len(found):
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


@contextmanager
def serving(home: Path) -> Generator[tuple[subprocess.Popen[str], str]]:
    """A hive as a process, and its URL; killed if a test leaves it running."""
    words = (*ASH, "up", "--port", "0")
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as hive:
        try:
            assert hive.stdout is not None
            assert select.select([hive.stdout], [], [], SECONDS)[0], "the hive says nothing"
            line = hive.stdout.readline()
            assert line.startswith("Ash serves at http://127.0.0.1:"), line
            yield hive, line.rpartition(" ")[2].strip()
        finally:
            hive.kill()


@pytest.mark.heavy
def test_the_demo_does_the_main_job_and_leaves_nothing(home: Path) -> None:
    done = subprocess.run(
        (*ASH, "up", "--port", "0", "--demo"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^  (spawn|tools/list|a command|destroy) +[0-9.]+ s  (.*)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in steps] == ["spawn", "tools/list", "a command", "destroy"]
    assert "sb1_" in steps[1][1] and "host sandbox" in steps[2][1] and "0 sandboxes are left" in steps[3][1]
    assert "claude mcp add --transport http ash http://127.0.0.1:" in done.stdout
    assert not (home / "run" / "hive.json").exists()
    assert family(home) == set()


@pytest.mark.heavy
def test_a_demo_whose_step_fails_says_which_and_exits_1(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home / "general"
    broken.mkdir()
    (broken / "recipe.toml").write_text(
        'name = "general"\ndescription = "cannot start"\n[server]\nstdio = {command = ["/nonexistent"]}\n'
    )
    monkeypatch.setenv("ASH_HUB_RECIPE_DIRS", json.dumps([str(broken)]))
    done = subprocess.run(
        (*ASH, "up", "--port", "0", "--demo"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1
    assert re.search(r"spawn +[0-9.]+ s  FAILED: ", done.stdout)
    assert "tools/list" not in done.stdout


@pytest.mark.heavy
def test_a_signal_ends_a_hive_gracefully_with_all_that_runs(home: Path) -> None:
    with serving(home) as (hive, url):
        spawned = subprocess.run((*ASH, "spawn", "echo", "--url", url), capture_output=True, timeout=SECONDS)
        assert spawned.returncode == 0, spawned.stderr
        before = family(home)
        assert len(before) > 1  # the keeper and a sandbox
        watched = [os.pidfd_open(pid) for pid in before]
        hive.send_signal(signal.SIGINT)
        _, err = hive.communicate(timeout=SECONDS)
        assert hive.returncode == 0
    assert "Stopping" in err and "Traceback" not in err
    for process in watched:
        assert select.select([process], [], [], SECONDS)[0], "a process of the hive goes on"
        os.close(process)
    assert not (home / "run" / "hive.json").exists()


BAD_SETTINGS: dict[str, tuple[dict[str, str], list[str], str]] = {
    "a port that is none": ({}, ["--port", "70000"], "--port"),
    "a variable with a slip": ({"ASH_HUB_PROT": "1"}, [], "did you mean ASH_HUB_PORT?"),
    "a variable that is no number": ({"ASH_HUB_PORT": "many"}, [], "ASH_HUB_PORT"),
    "a nested variable out of range": ({"ASH_HUB_LIMITS__STARTING": "0"}, [], "ASH_HUB_LIMITS__STARTING"),
    "an unknown nested variable": ({"ASH_HUB_LIMITS__FOO": "1"}, [], "ASH_HUB_LIMITS__FOO"),
    "a list that is no JSON": ({"ASH_HUB_RECIPE_DIRS": "/srv"}, [], "must be JSON, such as"),
    "a log that cannot be written": ({"ASH_HUB_LOG_DIR": "/proc/nope"}, [], "ASH_HUB_LOG_DIR"),
    "unsafe elsewhere": ({}, ["--unsafe", "--backend", "memory"], "for the local backend"),
    "an address that is none": ({}, ["--advertise", "host"], "--advertise"),
    "a password that others could read": ({}, ["--redis-url", "redis://:hidden@host"], "ASH_HUB_REDIS_URL"),
    "stdio with other options": ({}, ["--stdio", "--port", "1"], "leave the other options out"),
}


@pytest.mark.parametrize(("env", "words", "says"), BAD_SETTINGS.values(), ids=list(BAD_SETTINGS))
def test_bad_settings_are_a_usage_error_that_names_them(
    env: dict[str, str],
    words: list[str],
    says: str,
    home: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, out, err = ash(capfd, "up", *words)
    assert (code, out) == (2, "")
    assert says in err and "Traceback" not in err
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "--host 127.0.0.1"),
        (["--backend", "nope"], "there are:"),
        (["--advertise", "10.0.0.1:8421"], "--redis-url"),
        pytest.param(
            ["--redis-url", "redis://127.0.0.1:1"],
            "Redis at redis://127.0.0.1:1 cannot be used",
            marks=pytest.mark.heavy,  # it is given some seconds to come
        ),
    ],
    ids=["another address", "an unknown backend", "an address for nobody", "no Redis"],
)
def test_a_hive_that_cannot_start_says_why(words: list[str], says: str, home: Path) -> None:
    done = subprocess.run(
        (*ASH, "up", "--port", "0", *words), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not (home / "run" / "hive.json").exists()
    assert family(home) == set()


def test_a_port_that_is_taken_is_named(home: Path, hive_url: str) -> None:
    port = re.search(r":(\d+)/", hive_url)
    assert port is not None
    done = subprocess.run(
        (*ASH, "up", "--port", port[1]), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1
    assert f"port {port[1]}" in done.stderr and "--port" in done.stderr


def test_stdio_writes_nothing_but_mcp(hive_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASH_URL", hive_url)
    ask = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": ask})
    done = subprocess.run(
        (*ASH, "up", "--stdio"), input=line + "\n", capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    [answer] = [json.loads(text) for text in done.stdout.splitlines()]
    assert answer["id"] == 1 and answer["result"]["serverInfo"]["name"] == "ash"


def test_the_doctor_says_what_isolation_there_is(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = ash(capfd, "doctor", "--json")
    found = json.loads(out)
    assert err == "" and code == (0 if found["ok"] else 1)
    names = {check["name"] for check in found["checks"]}
    assert names >= {"bubblewrap", "python", "port", "hive", "state directory", "redis-server"}
    code, out, _ = ash(capfd, "doctor")
    assert code == (0 if found["ok"] else 1) and "bubblewrap" in out
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("chosen", ["by the option", "by the settings"])
def test_the_doctor_looks_at_the_cluster_of_the_backend_that_is_chosen(
    chosen: str, home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(home / "none"))
    words = ["--backend", "kubernetes"] if chosen == "by the option" else []
    if not words:
        monkeypatch.setenv("ASH_HUB_BACKEND__KIND", "kubernetes")
    code, out, err = ash(capfd, "doctor", *words)
    assert (code, err) == (1, "")
    assert "MISSING  API server" in out and "name a kubeconfig with KUBECONFIG" in out
    assert "Sandboxes cannot be made in this cluster: API server is missing" in out
    assert "bubblewrap" not in out and "state directory" in out


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["--backend", "nope"], {}, "knows the backends local and kubernetes"),
        (["--backend", "kubernetes"], {"ASH_HUB_BACKEND__CPU": "lots"}, "ASH_HUB_BACKEND__…): cpu"),
    ],
    ids=["an unknown backend", "a setting that is none"],
)
def test_the_doctor_refuses_settings_that_are_wrong(
    words: list[str],
    env: dict[str, str],
    says: str,
    home: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, out, err = ash(capfd, "doctor", *words)
    assert (code, out) == (2, "") and says in " ".join(err.split())


def test_the_doctor_says_what_to_install_and_exits_1_when_something_is_missing(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Check("bubblewrap", False, "not installed", "install it", required=True)
    weaker = Check("memory limits", False, "none", "delegate a control group")

    def probe(settings: object) -> list[Check]:
        del settings
        return [missing, weaker]

    monkeypatch.setattr("ash_hub.backends.local.host.probe", probe)
    code, out, _ = ash(capfd, "doctor")
    assert code == 1
    assert "MISSING  bubblewrap" in out and "-> install it" in out
    assert "limited  memory limits" in out and "-> delegate a control group" in out
    assert "cannot be isolated here: bubblewrap is missing" in out
