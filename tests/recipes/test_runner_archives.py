"""Folders as tar archives: what comes back is what went in, and no archive reaches beyond its folder."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from ash_recipes.runner.archives import pack, unpack
from ash_recipes.runner.problems import Problem


class CutOff(io.BytesIO):
    """Breaks off at its end, as a caller who leaves."""

    def read(self, size: int | None = -1) -> bytes:
        read = super().read(size)
        if not read:
            raise EOFError
        return read


def archive(*members: tuple[str, dict[str, object]]) -> bytes:
    """Return an archive of members: a name and what `TarInfo` has otherwise; `data` is a file's content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, more in members:
            member = tarfile.TarInfo(name)
            data = more.pop("data", b"")
            assert isinstance(data, bytes)
            member.size = len(data)
            for key, value in more.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def everything(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(root))] = (path.read_bytes(), path.stat().st_mode, int(path.stat().st_mtime))
        else:
            found[str(path.relative_to(root))] = path.stat().st_mode
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "a" / "b").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o555)
    (root / "a" / "run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "a" / "run.sh").chmod(0o755)
    (root / "a" / "b" / ("long" * 50)).write_bytes(os.urandom(1_500_000))
    (root / "ä ö\n").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff")).write_bytes(b"not UTF-8")
    (root / "a" / "up").symlink_to("../ä ö\n")
    os.utime(root / "a" / "run.sh", (1_000_000_000, 1_000_000_000))
    return root


def test_a_folder_comes_back_as_it_was(tree: Path, tmp_path: Path):
    unpacked = unpack(io.BytesIO(b"".join(pack(tree))), "new", tmp_path / "deep" / "new")
    assert everything(tmp_path / "deep" / "new") == everything(tree)
    assert unpacked is not None and unpacked.files == 5
    assert os.listdir(tmp_path / "deep") == ["new"]


def test_tar_itself_reads_and_writes_what_is_packed(tree: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xpf", "-", "-C", tmp_path / "out"], input=b"".join(pack(tree)), check=True)
    assert everything(tmp_path / "out") == everything(tree)
    for form in ("gnu", "pax", "ustar"):
        made = subprocess.run(
            [
                "tar",
                "-cf",
                "-",
                f"--format={form}",
                "-C",
                tree,
                *(["--exclude=long*"] if form == "ustar" else []),
                ".",
            ],
            capture_output=True,
            check=True,
        )
        unpack(io.BytesIO(made.stdout), form, tmp_path / form)
        names = everything(tree).keys() - ({f"a/b/{'long' * 50}"} if form == "ustar" else set[str]())
        assert everything(tmp_path / form).keys() == names


def test_pieces_are_small_whatever_the_file(tmp_path: Path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(20_000_000)
    assert max(len(piece) for piece in pack(tmp_path)) <= 1_100_000


def test_what_is_no_file_is_left_out(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "f").write_bytes(b"x")
    with tarfile.open(fileobj=io.BytesIO(b"".join(pack(tmp_path)))) as tar:
        assert tar.getnames() == ["f"]


def test_it_goes_into_a_folder_that_exists_and_the_rest_stays(tmp_path: Path):
    target = tmp_path / "t"
    (target / "d").mkdir(parents=True)
    (target / "d" / "old").write_bytes(b"old")
    (target / "d" / "both").write_bytes(b"old")
    unpack(io.BytesIO(archive(("d/both", {"data": b"new"}), ("d/new", {"data": b"new"}), ("e/f", {}))), "t", target)
    assert {path: found[0] for path, found in everything(target).items() if isinstance(found, tuple)} == {
        "d/old": b"old", "d/both": b"new", "d/new": b"new", "e/f": b"",
    }  # fmt: skip
    assert sorted(os.listdir(target)) == ["d", "e"]


Made = Callable[[], bytes]
LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
BAD: dict[str, list[tuple[str, dict[str, object]]]] = {
    "a name that leads up": [("../x", {})],
    "a name that leads up from within": [("a/../../x", {})],
    "an absolute name": [("/x", {})],
    "a link up": [("l", {"type": LINK, "linkname": "../x"})],
    "a link up from a folder": [("a/l", {"type": LINK, "linkname": "../../x"})],
    "an absolute link": [("l", {"type": LINK, "linkname": "/etc/passwd"})],
    "an empty link": [("l", {"type": LINK, "linkname": ""})],
    "a link up through a link": [
        ("a/b/p", {"type": LINK, "linkname": "../.."}), ("q", {"type": LINK, "linkname": "a/b/p/../x"}),
    ],
    "a file through a link": [("l", {"type": LINK, "linkname": "."}), ("l/f", {"data": b"x"})],
    "a hard link up": [("h", {"type": HARD, "linkname": "../x"})],
    "an absolute hard link": [("h", {"type": HARD, "linkname": "/etc/passwd"})],
    "a hard link to nothing": [("h", {"type": HARD, "linkname": "nothing"})],
    "a hard link to a link": [("l", {"type": LINK, "linkname": "f"}), ("h", {"type": HARD, "linkname": "l"})],
    "a device": [("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
    "a disk": [("sda", {"type": tarfile.BLKTYPE, "devmajor": 8})],
    "a pipe": [("pipe", {"type": tarfile.FIFOTYPE})],
    "the folder itself as a file": [(".", {"data": b"x"})],
    "a folder where a file is": [("f", {"data": b"x"}), ("f/g", {"data": b"x"})],
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("exists", [True, False])
def test_what_would_leave_the_folder_is_refused_and_nothing_is_changed(tmp_path: Path, what: str, exists: bool):
    (tmp_path / "x").write_bytes(b"outside")
    target = tmp_path / "t"
    if exists:
        target.mkdir()
        (target / "first").write_bytes(b"old")
    before = everything(tmp_path)
    with pytest.raises(Problem):
        unpack(io.BytesIO(archive(("first", {"data": b"new"}), *((n, dict(m)) for n, m in BAD[what]))), "t", target)
    assert everything(tmp_path) == before


def test_no_link_that_is_there_is_followed(tmp_path: Path):
    outside, target = tmp_path / "outside", tmp_path / "t"
    outside.mkdir()
    target.mkdir()
    (target / "l").symlink_to(outside)
    (target / "f").symlink_to(outside / "f")
    with pytest.raises(Problem):
        unpack(io.BytesIO(archive(("l/x", {"data": b"x"}))), "t", target)
    unpack(io.BytesIO(archive(("f", {"data": b"x"}))), "t", target)
    assert os.listdir(outside) == [] and (target / "f").read_bytes() == b"x"
    assert (target / "l").is_symlink() and sorted(os.listdir(target)) == ["f", "l"]


def test_links_within_it_stay(tmp_path: Path):
    made = archive(
        ("d/f", {"data": b"x"}),
        ("d/l", {"type": LINK, "linkname": "../d/f"}),
        ("d/h", {"type": HARD, "linkname": "d/f"}),
    )
    unpack(io.BytesIO(made), "t", tmp_path / "t")
    assert (tmp_path / "t/d/l").read_bytes() == (tmp_path / "t/d/h").read_bytes() == b"x"
    assert os.path.samefile(tmp_path / "t/d/h", tmp_path / "t/d/f")


def test_no_permission_beyond_the_usual_is_given(tmp_path: Path):
    unpack(
        io.BytesIO(archive(("f", {"mode": 0o6777}), ("d", {"type": tarfile.DIRTYPE, "mode": 0o3777}))),
        "t",
        tmp_path / "t",
    )
    assert [(tmp_path / "t" / name).stat().st_mode & 0o7777 for name in ("f", "d")] == [0o777, 0o777]


def cut(data: bytes) -> Iterable[bytes]:
    return [data[:size] for size in (0, 100, 512, 700, 1024, len(data) - 1)]


@pytest.mark.parametrize("exists", [True, False])
def test_an_archive_that_breaks_off_changes_nothing(tmp_path: Path, exists: bool):
    target = tmp_path / "t"
    if exists:
        target.mkdir()
        (target / "f").write_bytes(b"old")
    before = everything(tmp_path)
    for data in cut(archive(("f", {"data": bytes(2000)}))):
        assert unpack(CutOff(data), "t", target) is None
        assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "data", [b"x" * 600, b"\x1f\x8b\x08" + bytes(600), archive(("f", {"data": bytes(2000)}))[:1300]]
)
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, data: bytes):
    with pytest.raises(Problem) as refused:
        unpack(io.BytesIO(data), "t", tmp_path / "t")
    assert refused.value.kind == "bad_request" and os.listdir(tmp_path) == []


def test_a_folder_where_a_file_is_is_refused(tmp_path: Path):
    (tmp_path / "t").write_bytes(b"x")
    with pytest.raises(Problem) as refused:
        unpack(io.BytesIO(archive(("f", {}))), "t", tmp_path / "t")
    assert refused.value.http_status == 409
