"""Readers of image archives: an OCI layout, an archive of one, an archive of docker's.

Parts are looked up by names that a manifest gives, in what is there alone: no name is a way to another file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import posixpath
import shutil
import stat
import subprocess
import tarfile
import threading
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from ash_hub.images.manifests import (
    LARGEST_DOCUMENT,
    Descriptor,
    chosen,
    descriptors,
    diff_ids_of,
    manifest_of,
    parsed,
    refused,
    require_machine,
)
from ash_mcp.errors import ConfigError, Unsupported

__all__ = ["PackedImage", "PackedLayer", "Parts", "open_parts", "packed_image", "unpacked"]

_MOST_PARTS = 10_000
_CHUNK = 1024 * 1024
_MOST_PADDING = 64 * _CHUNK
"""What may follow the end of a layer's archive; tools fill up to a whole record."""
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Parts(Protocol):
    """The files of an archive or layout."""

    def __contains__(self, name: object) -> bool: ...

    def open(self, name: str) -> BinaryIO:
        """Open one; KeyError where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLayer:
    part: str
    diff_id: str
    """The digest of its archive, not compressed."""
    digest: str | None
    """Of the part as it is; None where nothing says it."""


@dataclass(frozen=True, slots=True)
class PackedImage:
    config: Mapping[str, object]
    digest: str
    """Of the configuration, which names all else: the image's id."""
    layers: tuple[PackedLayer, ...]


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._folder / name).is_file()

    def open(self, name: str) -> BinaryIO:
        # Docker's manifests give names of files, and the folder may have links: neither leads out of it.
        if not (self._folder / name).resolve().is_relative_to(self._folder.resolve()):
            raise KeyError(name)
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise KeyError(name) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise KeyError(name)
        return open(descriptor, "rb")


class _Archive:
    """An archive that is read where its parts are; nothing of it is unpacked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, tuple[int, int]] = {}
        links: dict[str, str] = {}
        try:
            with _Headers(path) as file, tarfile.open(fileobj=cast("BinaryIO", file), mode="r:") as archive:
                for count, member in enumerate(archive):
                    if count == _MOST_PARTS:
                        raise refused(f"its archive has more than {_MOST_PARTS} files")
                    name = posixpath.normpath(member.name)
                    if member.isreg() and not member.issparse():
                        self._parts[name] = (member.offset_data, member.size)
                    elif member.issym():  # docker's, for a layer that comes twice
                        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    archive.pax_headers = {}  # global ones would add up
        except (tarfile.TarError, OSError, ValueError, RecursionError, EOFError) as error:
            raise refused(f"{path} cannot be read as an archive: {error}") from error
        self._parts |= {name: self._parts[to] for name, to in links.items() if to in self._parts}

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def open(self, name: str) -> BinaryIO:
        start, size = self._parts[name]
        return cast("BinaryIO", io.BufferedReader(_Slice(self._path, start, size), _CHUNK))


class _Headers(io.FileIO):
    """An archive as `tarfile` reads its headers: no large piece at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _CHUNK:
            raise refused("a header of its archive is too long")
        return super().read(size) or b""


class _Slice(io.RawIOBase):
    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)
        self._file.seek(start)
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto(view) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_parts(path: Path) -> Parts:
    """Open a layout (a folder) or an archive.

    Raises:
        ConfigError: It is neither.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise ConfigError(f"there is no archive and no folder {path}")
    with open(path, "rb") as file:
        if file.read(4).startswith((_GZIP, _ZSTD)):
            raise ConfigError(f"{path} is compressed as a whole: unpack it first (gunzip, zstd -d)")
    return _Archive(path)


def packed_image(parts: Parts, machine: str) -> PackedImage:
    """Find the image for a machine, as `uname -m` names it.

    Raises:
        ConfigError: There is none, or it is not as it should be.
        Unsupported: It is for another machine.
    """
    if "index.json" in parts:
        return _of_layout(parts, machine)
    if "manifest.json" in parts:
        return _of_docker(parts, machine)
    raise ConfigError("it is no image: it has neither index.json (OCI) nor manifest.json (docker)")


def _of_layout(parts: Parts, machine: str) -> PackedImage:
    index = parsed(_read(parts, "index.json"), "index")
    found = chosen(descriptors(index.get("manifests"), "index"), machine)
    document = parsed(_blob(parts, found), "manifest")
    if "manifests" in document:  # an index within: one for several platforms
        found = chosen(descriptors(document["manifests"], "index"), machine)
        document = parsed(_blob(parts, found), "manifest")
    config, layers = manifest_of(document)
    return _packed(
        _blob(parts, config), config.digest, [(_path(each.digest), each.digest) for each in layers], machine
    )


def _of_docker(parts: Parts, machine: str) -> PackedImage:
    images = parsed(b'{"all": ' + _read(parts, "manifest.json") + b"}", "manifest")["all"]
    if not isinstance(images, list) or len(cast("list[object]", images)) != 1:
        raise refused("its archive has none or several images: save one")
    image = parsed(json.dumps(images[0]).encode(), "manifest")
    name, layers = str(image.get("Config", "")), image.get("Layers")
    if not isinstance(layers, list):
        raise refused("its manifest has no list of layers")
    config = _read(parts, posixpath.normpath(name))
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    return _packed(
        config, digest, [(posixpath.normpath(str(each)), None) for each in cast("list[object]", layers)], machine
    )


def _packed(config: bytes, digest: str, layers: list[tuple[str, str | None]], machine: str) -> PackedImage:
    document = parsed(config, "configuration")
    require_machine(document, machine)
    diff_ids = diff_ids_of(document)
    if len(diff_ids) != len(layers):
        raise refused(f"it has {len(layers)} layers, and its configuration says {len(diff_ids)}")
    return PackedImage(
        document,
        digest,
        tuple(PackedLayer(part, diff_id, its) for (part, its), diff_id in zip(layers, diff_ids, strict=True)),
    )


def _path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _blob(parts: Parts, descriptor: Descriptor) -> bytes:
    content = _read(parts, _path(descriptor.digest))
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != descriptor.digest:
        raise refused(f"what should be {descriptor.digest} is something else")
    return content


def _read(parts: Parts, name: str) -> bytes:
    try:
        with parts.open(name) as file:
            content = file.read(LARGEST_DOCUMENT + 1)
    except KeyError:
        raise refused(f"it has no {name!r}") from None
    if len(content) > LARGEST_DOCUMENT:
        raise refused(f"its {name!r} has more than {LARGEST_DOCUMENT} bytes")
    return content


class _Hashed:
    """Reads a stream and keeps the digest of what was read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(_CHUNK if size < 0 else min(size, _CHUNK))
        self._hash.update(data)
        return data

    def readable(self) -> bool:
        return True

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


@contextmanager
def unpacked(parts: Parts, layer: PackedLayer) -> Generator[BinaryIO]:
    """Yield the archive of a layer, not compressed; at the end all of it was read, and is what was promised.

    Raises:
        ConfigError: It is damaged, or something else.
        Unsupported: Nothing here can read how it is compressed.
    """
    try:
        part = parts.open(layer.part)
    except KeyError:
        raise refused(f"it has no {layer.part!r}") from None
    with part:
        head = part.peek(4) if isinstance(part, io.BufferedReader) else b""
        outer = _Hashed(cast("BinaryIO", part))
        try:
            with _decompressed(outer, head) as stream:
                inner = _Hashed(stream)
                yield cast("BinaryIO", inner)
                for _ in range(_MOST_PADDING // _CHUNK):
                    if not (data := inner.read(_CHUNK)):
                        break
                    if data.strip(b"\0"):
                        raise refused("a layer's archive goes on after its end")
                else:
                    raise refused("a layer's archive goes on after its end")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise refused(f"layer {layer.diff_id} is damaged: {error}") from error
        while outer.read(_CHUNK):
            pass
    if inner.digest != layer.diff_id or layer.digest not in (None, outer.digest):
        raise refused(f"layer {layer.diff_id} is damaged: its digest is another")


@contextmanager
def _decompressed(stream: _Hashed, head: bytes) -> Generator[BinaryIO]:
    if head.startswith(_GZIP):
        with gzip.GzipFile(fileobj=cast("BinaryIO", stream)) as file:
            yield cast("BinaryIO", file)
    elif head.startswith(_ZSTD):
        with _by_zstd(stream) as file:
            yield file
    else:
        yield cast("BinaryIO", stream)


@contextmanager
def _by_zstd(stream: _Hashed) -> Generator[BinaryIO]:
    program = shutil.which("zstd")
    if program is None:
        raise Unsupported("the image is compressed by zstd, which is not installed: `sudo apt-get install zstd`")
    process = subprocess.Popen([program, "-dcq"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    given = process.stdin

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), given:
            while data := stream.read(_CHUNK):
                given.write(data)

    feeding = threading.Thread(target=feed, daemon=True)
    feeding.start()
    try:
        yield cast("BinaryIO", process.stdout)
        feeding.join()
        if process.wait() != 0:
            raise EOFError("zstd cannot read it")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        feeding.join()
