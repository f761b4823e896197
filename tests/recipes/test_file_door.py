"""The runner's file door, over a real socket: ranges, conditions, listings, folders, and what breaks off."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import time
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from tests.recipes.runner_parts import ECHO, Runner, running

DATA = bytes(range(256)) * 4000


@pytest.fixture(scope="module")
def runner() -> Generator[Runner]:
    with running(ECHO) as runner:
        yield runner


@pytest.fixture
def http(runner: Runner) -> Generator[httpx.Client]:
    with runner.http() as http:
        yield http


@pytest.fixture
def file(runner: Runner) -> Path:
    path = runner.workspace / "data.bin"
    path.write_bytes(DATA)
    return path


def test_a_path_below_the_door_starts_at_the_workspace(runner: Runner, http: httpx.Client):
    put = http.put("/_ash/files/deep/a%20b%25.txt?mode=750", content=b"hi")
    assert (put.status_code, put.json()) == (201, {"bytes": 2})
    written = runner.workspace / "deep" / "a b%.txt"
    assert written.read_bytes() == b"hi" and written.stat().st_mode & 0o777 == 0o750
    got = http.get("/_ash/files/deep/a%20b%25.txt")
    assert (got.content, got.headers["content-type"]) == (b"hi", "text/plain")
    head = http.head("/_ash/files/deep/a%20b%25.txt")
    assert (head.headers["content-length"], head.headers["etag"]) == ("2", got.headers["etag"])
    assert http.delete("/_ash/files/deep/a%20b%25.txt").status_code == 204
    assert http.get("/_ash/files/deep/a%20b%25.txt").status_code == 404


RANGES = [
    ("bytes=0-0", 0, 1), ("bytes=5-9", 5, 10), ("bytes=1023990-", 1023990, 1024000), ("bytes=-3", 1023997, 1024000),
    ("bytes=-9999999999", 0, 1024000), ("bytes=100-99999999", 100, 1024000),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "begin", "end"), RANGES)
def test_a_range_is_answered_by_those_bytes(http: httpx.Client, file: Path, asked: str, begin: int, end: int):
    got = http.get("/_ash/files/data.bin", headers={"range": asked})
    assert (got.status_code, got.content) == (206, DATA[begin:end])
    assert got.headers["content-range"] == f"bytes {begin}-{end - 1}/{len(DATA)}"


@pytest.mark.parametrize("asked", ["bytes=1024000-", "bytes=-0"])
def test_a_range_beyond_the_end_is_416(http: httpx.Client, file: Path, asked: str):
    got = http.get("/_ash/files/data.bin", headers={"range": asked})
    assert (got.status_code, got.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


@pytest.mark.parametrize("asked", ["bytes=9-5", "bytes=-", "lines=1-2", "bytes=0-1,3-4", "bytes=x-"])
def test_any_other_range_is_answered_by_all(http: httpx.Client, file: Path, asked: str):
    got = http.get("/_ash/files/data.bin", headers={"range": asked})
    assert (got.status_code, got.content) == (200, DATA)


def test_a_file_that_has_changed_is_not_continued(http: httpx.Client, file: Path):
    tag = http.head("/_ash/files/data.bin").headers["etag"]
    some = {"range": "bytes=5-", "if-range": tag}
    assert http.get("/_ash/files/data.bin", headers=some).status_code == 206
    assert http.get("/_ash/files/data.bin", headers={"if-none-match": tag}).status_code == 304
    file.write_bytes(DATA[::-1])
    got = http.get("/_ash/files/data.bin", headers=some)
    assert (got.status_code, got.content) == (200, DATA[::-1])
    assert http.get("/_ash/files/data.bin", headers={"if-none-match": tag}).status_code == 200


def test_a_file_is_replaced_only_on_its_condition(http: httpx.Client, file: Path):
    tag = http.head("/_ash/files/data.bin").headers["etag"]
    for headers, path, status in (
        ({"if-match": '"other"'}, "data.bin", 412),
        ({"if-none-match": "*"}, "data.bin", 412),
        ({"if-match": "*"}, "nothing", 412),
        ({"if-match": tag}, "data.bin", 200),
        ({"if-none-match": "*"}, "new", 201),
    ):
        assert http.put(f"/_ash/files/{path}", content=b"x", headers=headers).status_code == status, headers
    assert not [name for name in os.listdir(file.parent) if name.startswith(".ash-")], "no draft is left"


def test_a_listing_is_whole_at_any_size(runner: Runner, http: httpx.Client):
    folder = runner.workspace / "many"
    folder.mkdir()
    for number in range(9000):
        (folder / f"file-{number:05}").touch()
    lines = http.get("/_ash/files/many/").text.splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["name"] for entry in entries] == [f"file-{number:05}" for number in range(9000)]
    assert entries[0]["type"] == "file"
    assert json.loads(http.get("/_ash/files/").text.splitlines()[0])["name"]
    assert http.get("/_ash/files/many").json()["error"]["kind"] == "is_a_directory"
    assert http.get("/_ash/files/many/file-00001/").status_code == 409


def test_a_file_whose_length_nobody_knows_is_read_to_its_end(http: httpx.Client):
    got = http.get("/_ash/files", params={"path": "/proc/self/status"})
    assert got.status_code == 200 and b"Umask" in got.content and "content-length" not in got.headers


def test_a_folder_goes_out_and_in_as_an_archive(runner: Runner, http: httpx.Client):
    (runner.workspace / "src" / "inner").mkdir(parents=True)
    (runner.workspace / "src" / "inner" / "f").write_bytes(b"x" * 700_000)
    by_query = http.get("/_ash/files/src?archive=tar")
    by_header = http.get("/_ash/files/src/", headers={"accept": "application/x-tar"})
    assert by_query.content == by_header.content and by_query.headers["content-type"] == "application/x-tar"
    put = http.put("/_ash/files/copy/", content=by_query.content)
    assert (put.status_code, put.json()) == (200, {"files": 1, "bytes": 700_000})
    assert (runner.workspace / "copy/inner/f").read_bytes() == b"x" * 700_000
    assert http.get("/_ash/files/nothing?archive=tar").status_code == 404
    assert http.get("/_ash/files/copy/inner/f?archive=tar").status_code == 409


def test_a_bad_archive_is_told_before_all_of_it_has_come(runner: Runner, http: httpx.Client):
    def endless() -> Generator[bytes]:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("../x"))
        yield out.getvalue()[:1024]
        for _ in range(400):
            yield bytes(65536)

    try:
        put = http.put("/_ash/files/bad/", content=endless())
    except httpx.WriteError:
        return  # it was told, and then the connection was closed
    assert (put.status_code, "leads out of the folder" in put.text) == (400, True)
    assert not (runner.workspace / "bad").exists()


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/_ash/files", 400),
        ("GET", "/_ash/files/a?path=b", 400),
        ("GET", "/_ash/files?path=a&path=b", 400),
        ("GET", "/_ash/filesystem", 404),
        ("PATCH", "/_ash/files/a", 405),
        ("PUT", "/_ash/files/a?mode=7777", 400),
        ("PUT", "/_ash/files/a?mode=rwx", 400),
        ("DELETE", "/_ash/files/nothing", 404),
        ("DELETE", "/_ash/files/?recursive=true", 403),
        ("GET", "/_ash/files/a%00b", 400),
    ],
)
def test_what_is_asked_wrongly_is_told(http: httpx.Client, method: str, target: str, status: int):
    content = b"x" if method == "PUT" else None
    assert http.request(method, target, content=content).status_code == status


def test_a_body_that_is_compressed_is_refused(http: httpx.Client):
    assert http.put("/_ash/files/a", content=b"x", headers={"content-encoding": "gzip"}).status_code == 415


def test_a_full_folder_is_removed_when_asked_twice(runner: Runner, http: httpx.Client):
    (runner.workspace / "full").mkdir()
    (runner.workspace / "full" / "f").touch()
    assert http.delete("/_ash/files/full").status_code == 409
    assert http.delete("/_ash/files/full?recursive=true").status_code == 204
    assert not (runner.workspace / "full").exists()


@pytest.mark.parametrize("target", ["data.bin", "folder/"])
def test_an_upload_that_breaks_off_changes_nothing(runner: Runner, file: Path, target: str):
    (runner.workspace / "folder").mkdir(exist_ok=True)
    before = sorted(os.listdir(runner.workspace))
    assert runner.path is not None
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("data.bin")
        member.size = 2_000_000
        tar.addfile(member, io.BytesIO(bytes(2_000_000)))
    head = f"PUT /_ash/files/{target} HTTP/1.1\r\nhost: x\r\nash-token: {runner.token()}\r\n"
    head += "content-length: 3000000\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as cut:
        cut.connect(runner.path)
        cut.sendall(head.encode() + out.getvalue()[:1_000_000])
    deadline = time.monotonic() + 10
    while sorted(os.listdir(runner.workspace)) != before or os.listdir(runner.workspace / "folder"):
        assert time.monotonic() < deadline
        os.sched_yield()
    assert file.read_bytes() == DATA


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees which files a runner has open: it is not dumpable")
def test_a_caller_who_leaves_ends_what_is_read_for_it(runner: Runner):
    with open(runner.workspace / "huge", "wb") as file:
        file.truncate(50_000_000_000)
    assert runner.path is not None
    with socket.socket(socket.AF_UNIX) as left:
        left.connect(runner.path)
        left.sendall(f"GET /_ash/files/huge HTTP/1.1\r\nhost: x\r\nash-token: {runner.token()}\r\n\r\n".encode())
        assert left.recv(1000)
        assert _open_in(runner, "huge")
    deadline = time.monotonic() + 10
    while _open_in(runner, "huge"):
        assert time.monotonic() < deadline
        os.sched_yield()


def _open_in(runner: Runner, name: str) -> bool:
    """Return whether a process of the runner has that file open."""
    path = str(runner.workspace / name)
    for process in _processes(runner.process.pid):
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                if os.readlink(link) == path:
                    return True
            except OSError:
                continue
    return False


def _processes(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(inner for child in children for inner in _processes(int(child)))]
