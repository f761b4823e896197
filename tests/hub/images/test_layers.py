"""Layers are unpacked as their makers meant them, and nothing of an archive full of tricks reaches beyond them."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from ash_hub.images.layers import Bounds, Unpacked, unpack
from ash_mcp.errors import CapacityExceeded, ConfigError
from tests.hub.images.image_parts import entry, layer, needs_root

pytestmark = needs_root
MIB = 1024 * 1024
OPAQUE = "trusted.overlay.opaque"


def unpacked(root: Path, archive: bytes, *below: Path, size: int = 64 * MIB, entries: int = 1000) -> Unpacked:
    root.mkdir()
    return unpack(io.BytesIO(archive), root, below, Bounds(size, entries))


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=kind, linkname=target, **more)


def test_owners_modes_times_and_links_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "root"
    archive = layer(
        entry("./home/joe", mode=0o2750, uid=1000, gid=1001),
        entry("home/joe/file", "hello", mode=0o640, uid=1000, gid=1001, mtime=1_000_000),
        link("home/joe/same", "home/joe/file", tarfile.LNKTYPE),
        link("etc/mtab", "/proc/self/mounts"),
        entry("run/pipe", type=tarfile.FIFOTYPE),
    )
    assert unpacked(root, archive).left_out == {}
    file = (root / "home/joe/file").stat()
    assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid, file.st_mtime) == (0o640, 1000, 1001, 1_000_000)
    assert file.st_ino == (root / "home/joe/same").stat().st_ino
    assert stat.S_IMODE((root / "home/joe").stat().st_mode) == 0o2750
    assert os.readlink(root / "etc/mtab") == "/proc/self/mounts"
    assert stat.S_ISFIFO((root / "run/pipe").lstat().st_mode)


def test_what_no_sandbox_can_have_is_left_out_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    archive = layer(
        entry("su", "x", mode=0o6755),
        entry("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=0),
        entry("deleted", type=tarfile.CHRTYPE, devmajor=0, devminor=0),  # to an overlay this would be a whiteout
        entry("far", "x", uid=70_000),
        entry("able", "x", pax_headers={"SCHILY.xattr.security.capability": "x"}),
    )
    left_out = unpacked(root, archive).left_out
    assert left_out == {
        "set-user-id bits": 1,
        "device nodes": 2,
        "owners over 65,535, who are nobody here": 1,
        "extended attributes": 1,
    }
    assert sorted(os.listdir(root)) == ["able", "far", "su"]
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o755
    assert (root / "far").stat().st_uid == 65_534


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../out", "leads out"),
        ("a/../../out", "leads out"),
        ("/".join(["d"] * 200), "too deep"),
        ("n" * 300, "too long"),
    ],
)
def test_a_name_that_leads_out_or_is_too_long_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unpacked(tmp_path / "root", layer(entry(name, "x")))
    assert os.listdir(tmp_path) == ["root"]


@pytest.mark.parametrize("target", ["{outside}", "../outside", "../../../../../../../../{outside}", "loop"])
def test_nothing_is_written_through_a_link_that_leads_out(tmp_path: Path, target: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = layer(
        link("loop", "loop2"),
        link("loop2", "loop"),
        link("way", target.format(outside=outside)),
        entry("way/file", "evil"),
        entry("way/.wh..wh..opq", ""),
        entry("way/.wh.gone", ""),
    )
    try:
        unpacked(tmp_path / "root", archive)
    except ConfigError as refused:
        assert "in circles" in str(refused)
    assert os.listdir(outside) == []
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]


def test_a_file_over_a_link_replaces_the_link(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_text("untouched")
    unpacked(tmp_path / "root", layer(link("file", str(outside)), entry("file", "new")))
    assert outside.read_text() == "untouched"
    assert (tmp_path / "root/file").read_text() == "new"


@pytest.mark.parametrize("target", ["../secret", "/no/such", "way/secret", "folder", ""])
def test_a_hard_link_to_what_is_no_file_of_the_image_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("secret")
    archive = layer(link("way", str(tmp_path)), entry("folder"), link("mine", target, tarfile.LNKTYPE))
    with pytest.raises(ConfigError, match=r"leads out|which is no file"):
        unpacked(tmp_path / "root", archive)


def test_deleted_names_become_the_overlays_marks(tmp_path: Path) -> None:
    lower, root = tmp_path / "lower", tmp_path / "root"
    unpacked(lower, layer(entry("etc", mode=0o711, uid=5), entry("etc/a", "1"), entry("var/log/x", "1")))
    archive = layer(
        entry("etc/.wh.a", ""),
        entry("var/.wh..wh..opq", ""),
        entry("var/new", "1"),
        entry(".wh..wh.plnk", ""),
        entry("again/file", "1"),
        entry(".wh.again", ""),
    )
    unpacked(root, archive, lower)
    assert is_whiteout(root / "etc/a")
    assert os.getxattr(root / "var", OPAQUE) == b"y"
    assert os.getxattr(root / "again", OPAQUE) == b"y", "deleted below, and made anew"
    assert sorted(os.listdir(root)) == ["again", "etc", "var"]
    implied = (root / "etc").stat()
    assert (stat.S_IMODE(implied.st_mode), implied.st_uid) == (0o711, 5), "as in the layer below"


def test_parents_are_those_that_the_layers_below_have(tmp_path: Path) -> None:
    lowest, middle, top = (tmp_path / name for name in ("lowest", "middle", "top"))
    unpacked(lowest, layer(link("lib", "usr/lib"), entry("usr/lib/old", "1", uid=7), entry("opt/gone", "1")))
    unpacked(middle, layer(entry(".wh.opt", "")), lowest)
    archive = layer(
        entry("lib/new", "1"), link("copy", "lib/old", tarfile.LNKTYPE), entry("opt/file", "1", mode=0o600)
    )
    unpacked(top, archive, middle, lowest)
    assert sorted(os.listdir(top)) == ["copy", "opt", "usr"]
    assert (top / "usr/lib/new").exists()
    assert (top / "copy").stat().st_uid == 7
    with pytest.raises(ConfigError, match="no file"):
        unpacked(tmp_path / "more", layer(link("x", "opt/gone", tarfile.LNKTYPE)), top, middle, lowest)


def test_a_bomb_is_bounded_in_size_and_in_number(tmp_path: Path) -> None:
    with pytest.raises(CapacityExceeded, match="larger than there is room"):
        unpacked(tmp_path / "large", layer(entry("zeros", bytes(3 * MIB))), size=2 * MIB)
    with pytest.raises(ConfigError, match="too many files"):
        unpacked(tmp_path / "many", layer(*(entry(f"f{n}", "") for n in range(20))), entries=10)
    with pytest.raises(CapacityExceeded):
        unpacked(tmp_path / "empty", layer(*(entry(f"f{n}", "") for n in range(20))), size=10 * 4096)


def test_what_is_read_and_not_written_is_bounded_too(tmp_path: Path) -> None:
    class Zeros(io.RawIOBase):
        """An entry that is passed over, with more content than any disk has."""

        head = entry(".wh.a", type=tarfile.REGTYPE, size=1 << 40)[0].tobuf()

        def read(self, size: int = -1) -> bytes:
            given, self.head = self.head[:size], self.head[size:]
            return given + bytes(size - len(given))

    (tmp_path / "root").mkdir()
    with pytest.raises(CapacityExceeded, match="larger than there is room"):
        unpack(cast("BinaryIO", Zeros()), tmp_path / "root", [], Bounds(MIB, 10))


def test_headers_for_all_entries_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    real = tarfile.TarFile.next

    def watched(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        held.append(len(archive.pax_headers))
        return real(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", watched)
    made = b""
    for number in range(5):
        with tarfile.open(
            fileobj=(out := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT, pax_headers={f"k{number}": "x" * 1000}
        ) as archive:
            archive.addfile(entry(f"f{number}")[0])
            made += out.getvalue()
    unpacked(tmp_path / "root", made + bytes(1024))
    assert sorted(os.listdir(tmp_path / "root")) == [f"f{number}" for number in range(5)]
    assert max(held) <= 1


def test_a_second_name_of_a_link_is_that_link(tmp_path: Path) -> None:
    lower, root, outside = tmp_path / "lower", tmp_path / "root", tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o600)
    unpacked(lower, layer(link("a", str(outside), uid=7), link("b", "a", tarfile.LNKTYPE)))
    unpacked(root, layer(link("c", "a", tarfile.LNKTYPE)), lower)
    assert os.readlink(lower / "b") == os.readlink(root / "c") == str(outside)
    assert (root / "c").lstat().st_uid == 7
    assert (outside.stat().st_uid, stat.S_IMODE(outside.stat().st_mode)) == (os.geteuid(), 0o600)


def _negative() -> bytes:
    made = bytearray(layer(entry("a", "x")))
    made[124:136] = b"\xff" * 12  # the size, in base 256
    made[148:156] = b"%06o\0 " % (sum(made[:148]) + 8 * 32 + sum(made[156:512]))
    return bytes(made)


def _typed(kind: bytes, *, times: int = 1) -> bytes:
    made, _ = entry("a", type=kind)
    return made.tobuf() * times + bytes(1024)


@pytest.mark.parametrize(
    "archive",
    [
        pytest.param(layer(entry("a", "x", pax_headers={"comment": "x" * (2 * MIB)})), id="long header"),
        pytest.param(layer(entry("a", bytes(100_000)))[:50_000], id="cut"),
        pytest.param(_typed(tarfile.GNUTYPE_LONGNAME, times=3000), id="chain of long names"),
        pytest.param(_typed(tarfile.GNUTYPE_SPARSE), id="sparse"),
        pytest.param(_typed(b"V"), id="unknown kind"),
        pytest.param(_negative(), id="negative size"),
    ],
)
def test_archives_that_no_tool_makes_are_refused(tmp_path: Path, archive: bytes) -> None:
    with pytest.raises(ConfigError, match="the image is refused"):
        unpacked(tmp_path / "root", archive)
