"""The images of a machine: kept once per layer, verified, whole or not at all, removed when nothing uses them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ash_hub.backends.local.keeper.used_directories import hold
from ash_hub.images import Image, ImageStore
from ash_hub.images.archives import open_parts
from ash_mcp.errors import CapacityExceeded, ConfigError, Unsupported
from tests.hub.images.image_parts import (
    HERE,
    archive_of,
    config_document,
    docker_archive,
    entry,
    layer,
    layout,
    needs_root,
    wait_until,
)

pytestmark = needs_root
MIB = 1024 * 1024
BASE, MORE = layer(entry("base", "1")), layer(entry("more", "2"))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", 256 * MIB)


def quiet(line: str) -> None:
    del line


def add(store: ImageStore, name: str, path: Path, **more: Any) -> Image:
    return store.add(name, open_parts(path), said=quiet, **more)


def left(store: ImageStore) -> tuple[list[str], list[str]]:
    return os.listdir(store.directory / "layers"), os.listdir(store.directory / "images")


def test_every_kind_of_archive_gives_the_same_layers(store: ImageStore, tmp_path: Path) -> None:
    folder = layout(tmp_path / "oci", BASE, MORE, Env=["A=1"], User="joe", WorkingDir="/srv/", Cmd=["x"])
    first = add(store, "first", folder)
    second = add(store, "second", archive_of(folder))
    third = add(store, "registry.test:5000/third:v1", docker_archive(tmp_path / "docker.tar", BASE, MORE, Env=["A=1"]))
    assert first.layers == second.layers == third.layers
    assert first.id == second.id != third.id
    assert (first.config.env, first.config.user, first.config.workdir) == ({"A": "1"}, "joe", "/srv")
    assert [each.short_name for each in store.list()] == [
        "first:latest",
        "second:latest",
        "registry.test:5000/third:v1",
    ]
    assert store.find("docker.io/library/first") == first
    assert [Path(root, name).read_text() for root, name in zip(store.roots(first), ("more", "base"), strict=True)] == [
        "2",
        "1",
    ]


def test_a_layer_that_comes_twice_in_an_archive_of_docker_is_found(store: ImageStore, tmp_path: Path) -> None:
    assert len(add(store, "twice", docker_archive(tmp_path / "docker.tar", BASE, BASE)).layers) == 2


def test_layers_are_kept_once_and_go_with_the_last_image(store: ImageStore, tmp_path: Path) -> None:
    one = add(store, "one", layout(tmp_path / "one", BASE, MORE))
    add(store, "two", layout(tmp_path / "two", BASE, layer(entry("other", "3"))))
    assert len(left(store)[0]) == 3
    assert store.remove("one")
    assert not store.remove("one")
    assert len(left(store)[0]) == 2
    assert one.layers[0] in left(store)[0]
    assert store.remove("two")
    assert left(store) == ([], [])


def test_layers_that_a_sandbox_uses_stay_until_it_has_ended(store: ImageStore, tmp_path: Path) -> None:
    image = add(store, "used", layout(tmp_path / "oci", BASE))
    held = os.open(store.used(image)[0], os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_SH)
    assert store.remove("used")
    assert left(store) == ([image.layers[0]], [])
    os.close(held)
    store.remove("used")
    assert left(store) == ([], [])


def test_what_a_killed_pull_fetched_goes_with_the_next_change(store: ImageStore, tmp_path: Path) -> None:
    with store.scratch() as mine:
        stale = store.directory / ".scratch-killed"
        stale.mkdir()
        add(store, "one", layout(tmp_path / "oci", BASE))
        assert mine.exists() and not stale.exists()


def test_nobody_can_begin_to_use_a_layer_that_is_just_removed(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = add(store, "used", layout(tmp_path / "oci", BASE))
    real, refused = Path.rename, list[str]()

    def rename(path: Path, target: Path) -> Path:
        try:
            os.close(hold(str(path)))
        except BlockingIOError:
            refused.append(str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    store.remove("used")
    assert refused == list(store.used(image))


def test_a_directory_of_another_users_is_no_place_for_images(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(theirs)
    os.chown(tmp_path / "link", 1000, 1000, follow_symlinks=False)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ImageStore(tmp_path / "link", 256 * MIB).list()
    assert theirs.stat().st_mode & 0o777 == 0o755
    os.chown(theirs, 1000, 1000)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ImageStore(theirs, 256 * MIB).list()


def test_names_of_a_manifest_lead_to_nothing_outside_its_folder(store: ImageStore, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_bytes(config_document([BASE], {}, HERE))
    (tmp_path / "secret").write_bytes(BASE)
    (folder / "way").symlink_to(tmp_path)
    for name in ("../secret", str(tmp_path / "secret"), "way/secret"):
        (folder / "manifest.json").write_text(json.dumps([{"Config": "config.json", "Layers": [name]}]))
        with pytest.raises(ConfigError, match="it has no"):
            add(store, "reaching", folder)


def test_an_archive_with_a_header_of_many_bytes_is_refused(store: ImageStore, tmp_path: Path) -> None:
    made = entry("a", pax_headers={"comment": "x" * 2 * MIB})[0].tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "a.tar").write_bytes(made + bytes(1024))
    with pytest.raises(ConfigError, match="header of its archive is too long"):
        add(store, "long", tmp_path / "a.tar")


def test_zeros_without_end_after_a_layer_are_refused(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes on after its end"):
        add(store, "long", layout(tmp_path / "oci", BASE + bytes(70 * MIB)))


def test_inodes_are_left_to_others(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = os.statvfs(tmp_path)
    few = os.statvfs_result((*given[:5], 1000, 49, 49, *given[8:]))

    def statvfs(path: Path) -> os.statvfs_result:
        del path
        return few

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(CapacityExceeded, match="few inodes"):
        add(store, "many", layout(tmp_path / "oci", BASE))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"WorkingDir": "/\ud800"}, "is no text"),
        ({"WorkingDir": "/a" * 2500}, "working directory is"),
        ({"WorkingDir": "/a/../.."}, "working directory is"),
        ({"Env": [f"A{number}={'x' * 40_000}" for number in range(2)]}, "more than 64 KiB"),
        ({"Env": ["=x"]}, "no environment variable"),
        ({"Env": "A=1"}, "where a list belongs"),
        ({"User": 3}, "is no text"),
    ],
)
def test_what_no_command_could_be_given_is_refused(
    store: ImageStore, tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        add(store, "odd", layout(tmp_path / "oci", BASE, **config))


def test_an_archive_is_not_kept_under_a_digest_that_nobody_checked(store: ImageStore, tmp_path: Path) -> None:
    name, folder = f"a@sha256:{'0' * 64}", layout(tmp_path / "oci", BASE)
    with pytest.raises(ConfigError, match="names a digest"):
        add(store, name, folder)
    assert add(store, name, folder, origin="registry").name.endswith("0000")  # where skopeo has checked it


def test_what_is_not_what_its_digest_says_is_refused(store: ImageStore, tmp_path: Path) -> None:
    folder = layout(tmp_path / "oci", BASE, MORE)
    for blob in (folder / "blobs/sha256").iterdir():
        kept = blob.read_bytes()
        blob.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ConfigError, match="the image is refused"):
            add(store, "changed", folder)
        blob.write_bytes(kept)
    assert left(store) == ([], [])
    archive = docker_archive(tmp_path / "docker.tar", BASE)
    archive.write_bytes(archive.read_bytes().replace(b"base", b"sabe", 1))
    with pytest.raises(ConfigError, match="digest is another"):
        add(store, "changed", archive)


def test_another_machines_image_is_named_with_both(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"is for linux/s390x, and this machine is linux/(amd64|arm64)"):
        add(store, "other", layout(tmp_path / "one", BASE, architecture="s390x"))
    folder = layout(tmp_path / "many", BASE)
    index = json.loads((folder / "index.json").read_text())
    of_machine = {"os": "linux", "architecture": "riscv64"}
    index["manifests"] = [{**index["manifests"][0], "platform": of_machine}]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(Unsupported, match=r"is for linux/riscv64, and this machine is linux/(amd64|arm64)"):
        add(store, "other", folder)


@pytest.mark.parametrize(
    "document",
    [
        b"{",
        b"[]",
        b'{"manifests": 3}',
        b'{"manifests": [{"digest": "sha256:../../../../etc/shadow"}]}',
        b'{"manifests": [{"digest": "md5:1"}]}',
        b"[" * 100_000,
        b"1" * (5 * MIB),
    ],
)
def test_documents_that_are_none_are_refused(store: ImageStore, tmp_path: Path, document: bytes) -> None:
    folder = layout(tmp_path / "oci", BASE)
    (folder / "index.json").write_bytes(document)
    with pytest.raises(ConfigError, match="the image is refused"):
        add(store, "bad", folder)


def test_a_killed_import_leaves_nothing_half_made(store: ImageStore, tmp_path: Path) -> None:
    folder = layout(tmp_path / "oci", BASE, layer(*(entry(f"f{n}", bytes(20_000)) for n in range(400))))
    with importing(store, folder) as process:
        wait_until(lambda: any((store.directory / "layers").glob(".new-*/root/f1*")))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert store.list() == []
    assert all(
        name.startswith(".new-") or (store.directory / "layers" / name / "layer.json").exists()
        for name in left(store)[0]
    )
    assert add(store, "again", folder).layers
    assert len(left(store)[0]) == 2
    store.remove("again")
    assert left(store) == ([], [])


def test_two_imports_of_one_image_at_once_make_one(store: ImageStore, tmp_path: Path) -> None:
    folder = layout(tmp_path / "oci", BASE, layer(*(entry(f"f{n}", bytes(10_000)) for n in range(500))))
    with importing(store, folder) as one, importing(store, folder) as other:
        assert one.wait(60) == other.wait(60) == 0
    assert len(left(store)[0]) == 2
    assert [image.short_name for image in store.list()] == ["again:latest"]


def test_images_take_no_more_than_they_may(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", 4 * MIB)
    large = [layer(entry(name, bytes(int(1.5 * MIB)))) for name in ("a", "b", "c")]
    add(store, "old", layout(tmp_path / "old", large[0]), origin="registry")
    add(store, "kept", layout(tmp_path / "kept", large[1]))
    add(store, "new", layout(tmp_path / "new", large[2]), origin="registry")
    assert [image.short_name for image in store.list()] == ["kept:latest", "new:latest"], "a registry has it still"
    with pytest.raises(CapacityExceeded, match="ash image remove"):
        add(store, "more", layout(tmp_path / "more", layer(entry("d", bytes(3 * MIB)))))
    assert "kept:latest" in [image.short_name for image in store.list()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g,nr_inodes=20", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_told_and_nothing_is_left(small_disk: Path, tmp_path: Path) -> None:
    store = ImageStore(small_disk / "store", 1024 * MIB)
    with pytest.raises(CapacityExceeded, match="the disk is full"):
        add(store, "many", layout(tmp_path / "oci", layer(*(entry(f"f{n}", "x") for n in range(40)))))
    assert left(store) == ([], [])
    subprocess.run(["mount", "-o", "remount,size=900m", small_disk], check=True)
    with pytest.raises(CapacityExceeded, match="less than 1 GiB of the disk"):
        add(store, "one", layout(tmp_path / "two", BASE))


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_layers_compressed_by_zstd_are_read(store: ImageStore, tmp_path: Path) -> None:
    packed = subprocess.run(["zstd", "-qc"], input=BASE, stdout=subprocess.PIPE, check=True).stdout
    archive = docker_archive(tmp_path / "docker.tar", packed)
    mine, its = (hashlib.sha256(each).hexdigest().encode() for each in (BASE, packed))
    archive.write_bytes(archive.read_bytes().replace(its, mine))
    assert add(store, "zstd", archive).layers


def importing(store: ImageStore, folder: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from ash_hub.images import ImageStore; "
        "from ash_hub.images.archives import open_parts; "
        "ImageStore(Path(sys.argv[1]), 1 << 28).add('again', open_parts(Path(sys.argv[2])), said=lambda line: None)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(store.directory), str(folder)])
