"""The images of this machine: each a record by its name, over layers that are kept once.

    images/<hash of the name>.json    a record
    layers/<chain id>/root            a layer on those below it, unpacked; layer.json says how large it is
    layers/.new-*                     one that is being unpacked
    .scratch-*                        what becomes an image, of a process that fetches it
    lock                              of whoever changes something

A layer is there whole or not at all: it is unpacked beside, verified, put on the disk and renamed. Whoever begins a
sandbox from a layer holds it by a lock on its directory (`used_directories.py`), and it is not removed meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ash_hub.images.archives import PackedLayer, Parts, packed_image, unpacked
from ash_hub.images.layers import Bounds, unpack
from ash_hub.images.manifests import ImageConfig, chain_ids, config_of
from ash_hub.images.names import full_name, short_name
from ash_hub.system.files import replace_text
from ash_mcp.errors import CapacityExceeded, ConfigError

__all__ = ["Image", "ImageStore"]

_MOST_ENTRIES = 1_000_000
_WAIT_SECONDS, _PAUSE_SECONDS = 1800.0, 0.1
_SPARE_BYTES = 1024 * 1024 * 1024
"""What an image leaves of a disk."""
_SPARE_FILES = 20
"""The part of a disk's inodes that it leaves: a twentieth."""
_NEW, _SCRATCH = ".new-", ".scratch-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    name: str
    """In full."""
    id: str
    """The digest of its configuration."""
    layers: tuple[str, ...]
    """Directories below the store's own, the lowest first."""
    config: ImageConfig
    bytes: int
    """Of its layers, unpacked; other images may share them."""
    created_at: float
    origin: str
    """`registry` or `archive`; only what comes from a registry is removed to make room."""
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def short_name(self) -> str:
        return short_name(self.name)


class ImageStore:
    """The images below a directory.

    Args:
        directory: Made where it is missing, for its user alone.
        most_bytes: What all layers may take, unpacked.
        machine: What images must be for, as `uname -m` names it.
    """

    def __init__(self, directory: Path, most_bytes: int, machine: str | None = None) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._machine = machine or os.uname().machine

    @property
    def directory(self) -> Path:
        return self._directory

    def find(self, name: str) -> Image | None:
        """Return an image of that name.

        Raises:
            ConfigError: It is no name of an image.
        """
        record = self._record(full_name(name))
        found = _read(record)
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(record)  # it was used last now
        return found

    def list(self) -> list[Image]:
        """Return all images, by name."""
        found = (_read(path) for path in self._below("images").glob("*.json"))
        return sorted((image for image in found if image is not None), key=lambda image: image.name)

    def roots(self, image: Image) -> tuple[str, ...]:
        """Return the directories of an image's layers, the highest first."""
        return tuple(str(self._layer(each) / "root") for each in reversed(image.layers))

    def used(self, image: Image) -> tuple[str, ...]:
        """Return the directories to hold as long as something runs from an image."""
        return tuple(str(self._layer(each)) for each in image.layers)

    def add(self, name: str, parts: Parts, *, origin: str = "archive", said: Callable[[str], None] = print) -> Image:
        """Keep an image under a name, which another may have had before.

        Args:
            said: Told what is done, a line each.

        Raises:
            ConfigError: It is not as it should be, or does what none should; nothing of it is kept.
            Unsupported: It is for another machine, or compressed in a way that nothing here can read.
            CapacityExceeded: There is no room for it.
        """
        if os.geteuid() != 0:
            raise ConfigError("images are unpacked with their owners and marks, which takes root: run this as root")
        full, packed = full_name(name), packed_image(parts, self._machine)
        if "@" in full and origin != "registry":
            raise ConfigError(f"{name} names a digest, which only a registry's image is checked by: give it a tag")
        config = config_of(packed.config)
        chain = [each.replace("sha256:", "") for each in chain_ids([each.diff_id for each in packed.layers])]
        with self._locked():
            left_out = Counter[str]()
            try:
                for number, layer in enumerate(packed.layers):
                    below = [self._layer(each) / "root" for each in reversed(chain[:number])]
                    if not self._layer(chain[number]).is_dir():
                        said(f"layer {number + 1} of {len(chain)}")
                        self._unpack(parts, layer, chain[number], below, keep=chain)
                    left_out.update(_about(self._layer(chain[number]))["left_out"])
                image = Image(
                    name=full,
                    id=packed.digest,
                    layers=tuple(chain),
                    config=config,
                    bytes=sum(_about(self._layer(each))["bytes"] for each in chain),
                    created_at=time.time(),
                    origin=origin,
                    left_out=dict(left_out),
                )
                replace_text(self._record(full), json.dumps(asdict(image)))
            finally:
                self._remove_unused()
        return image

    def remove(self, name: str) -> bool:
        """Forget an image, with the layers that no other has and no sandbox uses; return whether it was there."""
        with self._locked():
            record = self._record(full_name(name))
            was_there = record.exists()
            record.unlink(missing_ok=True)
            self._remove_unused()
        return was_there

    @contextlib.contextmanager
    def scratch(self) -> Generator[Path]:
        """Give a new folder on the same disk, for what becomes an image; those of killed processes are removed."""
        self._below("images")
        with self._scratch_locked():
            made = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._directory))
            held = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(held, fcntl.LOCK_SH)
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
            os.close(held)

    @contextlib.contextmanager
    def _scratch_locked(self) -> Generator[None]:
        with _flocked(self._directory / "scratch.lock"):
            for stale in self._directory.glob(f"{_SCRATCH}*"):
                with _unused(stale) as is_unused:
                    if is_unused:
                        shutil.rmtree(stale, ignore_errors=True)
            yield

    def _unpack(
        self, parts: Parts, layer: PackedLayer, chain_id: str, below: Sequence[Path], *, keep: Sequence[str]
    ) -> None:
        target = self._layer(chain_id)
        made = target.parent / f"{_NEW}{chain_id}"
        shutil.rmtree(made, ignore_errors=True)
        (made / "root").mkdir(parents=True)
        (made / "root").chmod(0o755)
        bounds = Bounds(self._room(keep), _MOST_ENTRIES, lambda taken: self.check_disk())
        try:
            self.check_disk()
            with unpacked(parts, layer) as stream:
                found = unpack(stream, made / "root", below, bounds)
            (made / "layer.json").write_text(json.dumps({"bytes": found.bytes, "left_out": dict(found.left_out)}))
            _sync(made)
            made.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CapacityExceeded("the disk is full; `ash image remove` makes room") from error
            raise ConfigError(f"the image cannot be unpacked in {self._directory}: {error}") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _room(self, keep: Sequence[str]) -> int:
        """Return how many bytes a layer may take; images of registries make room, those not used for longest first."""
        self._remove_unused(keep)
        while (
            room := self._most_bytes - sum(_about(path)["bytes"] for path in self._layers())
        ) < self._most_bytes // 4:
            old = [
                (self._record(image.name).stat().st_mtime, image)
                for image in self.list()
                if image.origin == "registry" and not set(image.layers) & set(keep) and not self._is_used(image)
            ]
            if not old:
                break
            self._record(min(old, key=lambda pair: pair[0])[1].name).unlink(missing_ok=True)
            self._remove_unused(keep)
        if room <= 0:
            most = self._most_bytes >> 20
            raise CapacityExceeded(f"images take all of their {most} MiB; `ash image remove` makes room")
        return room

    def _is_used(self, image: Image) -> bool:
        for path in self.used(image):
            with _unused(Path(path)) as is_unused:
                if not is_unused:
                    return True
        return False

    def check_disk(self) -> None:
        """Refuse where what is free of the disk is for others.

        Raises:
            CapacityExceeded: It is.
        """
        found = os.statvfs(self._directory)
        if found.f_favail < found.f_files // _SPARE_FILES:
            raise CapacityExceeded("the disk has few inodes left for files; `ash image remove` makes room")
        if found.f_bavail * found.f_frsize < _SPARE_BYTES:
            raise CapacityExceeded("less than 1 GiB of the disk is free; `ash image remove` makes room")

    def _remove_unused(self, keep: Sequence[str] = ()) -> None:
        """Remove layers that no image has and nobody holds. A layer is removed before those that it stands on."""
        named = {each for image in self.list() for each in image.layers} | set(keep)
        for path in self._layers():
            if path.name in named:
                continue
            with _unused(path) as is_unused:
                if is_unused:
                    doomed = path.parent / f"{_NEW}{path.name}"
                    path.rename(doomed)
                    shutil.rmtree(doomed, ignore_errors=True)

    def _layers(self) -> list[Path]:
        return [path for path in self._below("layers").iterdir() if not path.name.startswith(_NEW)]

    def _layer(self, chain_id: str) -> Path:
        return self._below("layers") / chain_id

    def _record(self, full: str) -> Path:
        return self._below("images") / f"{hashlib.sha256(full.encode()).hexdigest()[:32]}.json"

    def _below(self, name: str) -> Path:
        path = self._directory / name
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(it.st_uid != os.geteuid() for it in (self._directory.lstat(), self._directory.stat())):
                raise ConfigError(f"{self._directory} belongs to another user; set ASH_HUB_BACKEND__IMAGE_DIR")
            # the files of images belong to users of this host, and programs of theirs may be anybody's
            self._directory.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"the directory of images {path} cannot be made: {error.strerror}") from error
        return path

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Be the only one that changes something; what a killed one left is removed."""
        self._below("images")
        with _flocked(self._directory / "lock"):
            for stale in self._below("layers").glob(f"{_NEW}*"):
                shutil.rmtree(stale, ignore_errors=True)
            with self._scratch_locked():
                pass
            yield


@contextlib.contextmanager
def _flocked(path: Path) -> Generator[None]:
    with open(path, "ab") as file:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CapacityExceeded("another import into these images goes on; try again") from None
                time.sleep(_PAUSE_SECONDS)
        yield


def _read(record: Path) -> Image | None:
    try:
        given: dict[str, Any] = json.loads(record.read_text())
        more: dict[str, Any] = {"layers": tuple(given["layers"]), "config": ImageConfig.from_json(given["config"])}
        return Image(**dict[str, Any](given, **more))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # of another version; an import of that name replaces it


def _about(layer: Path) -> Mapping[str, Any]:
    try:
        return json.loads((layer / "layer.json").read_text())
    except (OSError, ValueError):
        return {"bytes": 0, "left_out": {}}


@contextlib.contextmanager
def _unused(path: Path) -> Generator[bool]:
    """Yield whether nobody holds a directory; if so, nobody can begin to as long as this is entered."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it has gone, or is none
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_unused = False
    else:
        is_unused = True
    try:
        yield is_unused
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    """Have the disk keep what was written, so that no power cut leaves a layer with empty files."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "the disk did not take what was written")
    finally:
        os.close(descriptor)
