"""File operations: typed failures, odd paths, and no way to hang."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio
import pytest

from ash_recipes.runner.context import Context
from ash_recipes.runner.files import Files
from ash_recipes.runner.tools import RunnerTools
from tests.recipes.calls import call, refused

pytestmark = pytest.mark.anyio


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def read(tools: RunnerTools, path: str) -> bytes:
    return base64.b64decode((await call(tools, "file_read", path=path))["data_base64"])


async def test_a_file_is_written_with_its_parents_and_read_back(tools: RunnerTools, context: Context) -> None:
    done = await call(tools, "file_write", path="a/b/c.bin", data_base64=coded(b"\0\xff"), mode=0o750)
    assert done == {"bytes": 2, "size": 2}
    assert (context.workspace / "a/b/c.bin").stat().st_mode & 0o777 == 0o750
    assert await call(tools, "file_read", path="a/b/c.bin") == {
        "data_base64": coded(b"\0\xff"),
        "size": 2,
        "eof": True,
    }


async def test_a_large_file_comes_in_pieces(tools: RunnerTools) -> None:
    data = os.urandom(700_000)
    await call(tools, "file_write", path="big", data_base64=coded(data[:524_288]))
    await call(tools, "file_write", path="big", data_base64=coded(data[524_288:]), offset=524_288)
    first = await call(tools, "file_read", path="big")
    assert (first["size"], first["eof"]) == (700_000, False)
    rest = await call(tools, "file_read", path="big", offset=524_288)
    assert rest["eof"] and base64.b64decode(first["data_base64"] + "") + base64.b64decode(rest["data_base64"]) == data


async def test_a_repeated_piece_does_no_harm_and_a_gap_is_refused(tools: RunnerTools) -> None:
    await call(tools, "file_write", path="f", data_base64=coded(b"abc"))
    for _ in range(2):
        assert (await call(tools, "file_write", path="f", data_base64=coded(b"def"), offset=3))["size"] == 6
    kind, message = await refused(tools, "file_write", path="f", data_base64=coded(b"x"), offset=9)
    assert kind == "bad_request" and "would leave a gap" in message and await read(tools, "f") == b"abcdef"


async def test_writing_without_an_offset_replaces(tools: RunnerTools) -> None:
    await call(tools, "file_write", path="f", data_base64=coded(b"long content"))
    assert (await call(tools, "file_write", path="f", data_base64=coded(b"short")))["size"] == 5


async def test_entries_tell_what_they_are(tools: RunnerTools, context: Context) -> None:
    (context.workspace / "file").write_text("12345")
    (context.workspace / "folder").mkdir()
    (context.workspace / "link").symlink_to("file")
    os.mkfifo(context.workspace / "pipe")
    listing = await call(tools, "file_list")
    assert [(entry["name"], entry["type"]) for entry in listing["entries"]] == [
        ("file", "file"),
        ("folder", "directory"),
        ("link", "symlink"),
        ("pipe", "other"),
    ]
    found = await call(tools, "file_stat", path="file")
    assert (found["size"], found["path"]) == (5, f"{context.workspace}/file") and found["modified_at"].endswith("Z")
    assert (await call(tools, "file_stat", path="link"))["type"] == "symlink"
    assert (await call(tools, "file_stat", path="/"))["type"] == "directory"


async def test_odd_names_are_names(tools: RunnerTools, context: Context) -> None:
    for name in ("a b", "-rf", "new\nline", "tab\t", "é", "%2e", "x" * 255):
        await call(tools, "file_write", path=name, data_base64=coded(name.encode()))
        assert await read(tools, name) == name.encode()
    (context.workspace / os.fsdecode(b"\xff.txt")).write_text("raw")
    names = [entry["name"] for entry in (await call(tools, "file_list"))["entries"]]
    assert "\ufffd.txt" in names and json.dumps(names)


async def test_a_link_is_followed_for_its_content_and_not_when_it_is_removed(
    tools: RunnerTools, context: Context
) -> None:
    target = context.workspace / "target"
    target.mkdir()
    (target / "kept").write_text("kept")
    (context.workspace / "link").symlink_to(target)
    assert await read(tools, "link/kept") == b"kept"
    await call(tools, "file_remove", path="link", recursive=True)
    assert (target / "kept").read_text() == "kept" and not (context.workspace / "link").is_symlink()


async def test_a_dangling_link_is_an_entry_that_cannot_be_read(tools: RunnerTools, context: Context) -> None:
    (context.workspace / "link").symlink_to("nowhere")
    assert (await call(tools, "file_stat", path="link"))["type"] == "symlink"
    assert (await refused(tools, "file_read", path="link"))[0] == "file_not_found"


async def test_a_loop_of_links_is_refused(tools: RunnerTools, context: Context) -> None:
    (context.workspace / "one").symlink_to("two")
    (context.workspace / "two").symlink_to("one")
    assert (await refused(tools, "file_read", path="one"))[0] == "bad_request"


async def test_a_removed_tree_takes_nothing_else_along(tools: RunnerTools, context: Context) -> None:
    outside = context.home / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    tree = context.workspace / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "link").symlink_to(outside)
    assert (await refused(tools, "file_remove", path="tree"))[0] == "is_a_directory"
    assert await call(tools, "file_remove", path="tree", recursive=True) == {"removed": True}
    assert not tree.exists() and (outside / "kept").exists()


async def test_an_empty_directory_needs_no_recursion(tools: RunnerTools) -> None:
    await call(tools, "file_mkdir", path="empty")
    assert await call(tools, "file_remove", path="empty") == {"removed": True}


@pytest.mark.parametrize("path", [".", "/", "..", "sub/..", "../workspace"])
async def test_the_workspace_itself_stays(tools: RunnerTools, context: Context, path: str) -> None:
    (context.workspace / "sub").mkdir()
    assert (await refused(tools, "file_remove", path=path, recursive=True))[0] == "not_permitted"
    assert (await refused(tools, "file_move", source=path, destination="elsewhere"))[0] == "not_permitted"
    assert context.workspace.is_dir()


async def test_a_move_replaces_a_file_and_makes_parents(tools: RunnerTools, context: Context) -> None:
    (context.workspace / "old").write_text("old")
    (context.workspace / "new").write_text("new")
    done = await call(tools, "file_move", source="old", destination="new")
    assert done["path"] == f"{context.workspace}/new" and (context.workspace / "new").read_text() == "old"
    await call(tools, "file_move", source="new", destination="deep/er/new")
    assert (context.workspace / "deep/er/new").read_text() == "old"


async def test_a_move_does_not_swallow_a_directory(tools: RunnerTools, context: Context) -> None:
    (context.workspace / "full").mkdir()
    (context.workspace / "full/x").touch()
    (context.workspace / "other").mkdir()
    assert (await refused(tools, "file_move", source="other", destination="full"))[0] == "file_exists"
    (context.workspace / "f").touch()
    assert (await refused(tools, "file_move", source="f", destination="full"))[0] == "is_a_directory"


async def test_mkdir_with_and_without_parents(tools: RunnerTools) -> None:
    await call(tools, "file_mkdir", path="a/b")
    await call(tools, "file_mkdir", path="a/b")
    assert (await refused(tools, "file_mkdir", path="a/b", parents=False))[0] == "file_exists"
    assert (await refused(tools, "file_mkdir", path="c/d", parents=False))[0] == "file_not_found"


async def test_pipes_and_devices_do_not_hang_a_call(tools: RunnerTools, context: Context) -> None:
    os.mkfifo(context.workspace / "pipe")
    with anyio.fail_after(20):
        assert (await refused(tools, "file_read", path="pipe"))[0] == "bad_request"
        assert (await refused(tools, "file_write", path="pipe", data_base64=""))[0] in ("bad_request", "file_error")
        assert (await refused(tools, "file_read", path="/dev/zero"))[0] == "bad_request"


async def test_files_without_a_size_are_read_all_the_same(tools: RunnerTools) -> None:
    done = await call(tools, "file_read", path="/proc/self/status")
    assert done["eof"] and b"Umask:" in base64.b64decode(done["data_base64"])


async def test_a_huge_directory_is_listed_in_part(tools: RunnerTools, context: Context) -> None:
    folder = context.workspace / "many"
    folder.mkdir()
    for number in range(6000):
        (folder / f"{number:05}").touch()
    result = await tools.call("ash_file_list", {"path": "many"})
    listing = result["structuredContent"]
    assert listing["truncated"] and listing["total"] == 6000 and len(json.dumps(result)) < 1_000_000


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("file_read", {"path": "missing"}, "file_not_found"),
        ("file_read", {"path": "."}, "is_a_directory"),
        ("file_read", {"path": "file/x"}, "not_a_directory"),
        ("file_read", {"path": ""}, "bad_request"),
        ("file_read", {"path": "a\0b"}, "bad_request"),
        ("file_read", {"path": "\ud800"}, "bad_request"),
        ("file_read", {"path": "file", "limit": 524_289}, "bad_request"),
        ("file_read", {"path": "file", "offset": -1}, "bad_request"),
        ("file_read", {"path": "x" * 300}, "bad_request"),
        ("file_write", {"path": ".", "data_base64": ""}, "is_a_directory"),
        ("file_write", {"path": "file/x", "data_base64": ""}, "not_a_directory"),
        ("file_write", {"path": "new", "data_base64": "", "offset": 5}, "file_not_found"),
        ("file_write", {"path": "new", "data_base64": "", "mode": -1}, "bad_request"),
        ("file_list", {"path": "file"}, "not_a_directory"),
        ("file_stat", {"path": "missing"}, "file_not_found"),
        ("file_move", {"source": "missing", "destination": "x"}, "file_not_found"),
        ("file_remove", {"path": "missing"}, "file_not_found"),
        ("file_remove", {"path": "file", "recursive": "yes"}, "bad_request"),
        ("file_read", {}, "bad_request"),
        ("file_mkdir", {"path": "file/x"}, "not_a_directory"),
        ("file_mkdir", {"path": "file"}, "file_exists"),
    ],
)
async def test_failures_have_their_kind(
    tools: RunnerTools, context: Context, name: str, arguments: dict[str, Any], kind: str
) -> None:
    (context.workspace / "file").write_text("x")
    assert (await refused(tools, name, **arguments))[0] == kind
    assert sorted(entry.name for entry in context.workspace.iterdir()) == ["file"]


def kind_in_another_process(folder: Path, before: str, operation: str) -> str:
    """Return the kind of the failure of `operation` in a process that first does `before` to itself."""
    script = f"""
import os, resource, sys
from pathlib import Path
from ash_recipes.runner.files import Files
from ash_recipes.runner.problems import Problem
files = Files(Path({str(folder)!r}))
{before}
try:
    {operation}
except Problem as exc:
    print(exc.kind)
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "operation",
    ["files.write('closed/x', b'', None, None)", "files.read('secret', 0, 9)", "files.list('closed/deep')"],
)
def test_what_may_not_be_touched_is_told(operation: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed/deep").mkdir(parents=True)
        (folder / "secret").touch(mode=0o000)
        (folder / "closed").chmod(0o000)
        leave_root = "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)"
        assert kind_in_another_process(folder, leave_root, operation) == "not_permitted"
        (folder / "closed").chmod(0o700)


@pytest.mark.parametrize(
    "operation",
    ["files.write('f', b'x' * 99, None, None)", "files.append('f', b'x' * 99)", "files.upload('f').write(b'x' * 99)"],
)
def test_a_full_disk_is_told(tmp_path: Path, operation: str) -> None:
    full = "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))"
    assert kind_in_another_process(tmp_path, full, operation) == "no_space"


def test_an_upload_changes_nothing_until_all_of_it_has_come(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("before")
    target.chmod(0o640)
    (tmp_path / "link").symlink_to("f")
    files = Files(tmp_path)
    upload = files.upload("link")
    upload.write(b"half")
    assert target.read_text() == "before"
    upload.abandon()
    assert target.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    upload = files.upload("link")
    upload.write(b"after")
    assert upload.finish() == 5
    upload.abandon()
    assert target.read_text() == "after" and (tmp_path / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
