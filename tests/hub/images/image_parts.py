"""Images for tests, built here: layers of entries, packed as an OCI layout, an archive of one, or docker's."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "HERE",
    "archive_of",
    "config_document",
    "docker_archive",
    "entry",
    "layer",
    "layout",
    "needs_root",
    "programs",
    "wait_until",
]

HERE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
"""This machine's architecture, as images name it."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="images are unpacked by root")

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes | str | None = None, **more: Any) -> Entry:
    """Return a file with `content`, else what `type` says, else a directory."""
    made = tarfile.TarInfo(name)
    data = content.encode() if isinstance(content, str) else content or b""
    made.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
    made.mode = 0o644 if content is not None else 0o755
    made.size = len(data)
    for field, value in more.items():
        setattr(made, field, value)
    return made, data


def layer(*entries: Entry) -> bytes:
    """Return the archive of a layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for made, data in entries:
            archive.addfile(made, io.BytesIO(data))
    return out.getvalue()


def config_document(layers: Sequence[bytes], config: Mapping[str, Any], architecture: str) -> bytes:
    diff_ids = [_digest(each) for each in layers]
    found = {"architecture": architecture, "os": "linux", "config": config}
    return json.dumps({**found, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()


def layout(folder: Path, *layers: bytes, architecture: str = HERE, **config: Any) -> Path:
    """Make an OCI layout in a folder; layers are compressed."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, kind: str) -> dict[str, Any]:
        digest = _digest(content)
        (blobs / digest.partition(":")[2]).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(content)}

    packed = [put(gzip.compress(each, 1, mtime=0), "layer.v1.tar+gzip") for each in layers]
    its_config = put(config_document(layers, config, architecture), "config.v1+json")
    manifest = {"schemaVersion": 2, "config": its_config, "layers": packed}
    found = put(json.dumps(manifest).encode(), "manifest.v1+json")
    found["platform"] = {"os": "linux", "architecture": architecture}
    index = {"schemaVersion": 2, "manifests": [found]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def archive_of(folder: Path) -> Path:
    """Return an archive of a layout, beside it."""
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


def docker_archive(path: Path, *layers: bytes, **config: Any) -> Path:
    """Make an archive as `docker save` did for years: each layer in a folder, one that comes twice as a link."""
    seen: dict[bytes, str] = {}
    with tarfile.open(path, "w") as archive:
        names: list[str] = []
        for number, content in enumerate(layers):
            name = f"{number:064x}/layer.tar"
            made, data = entry(name, content)
            if content in seen:
                made, data = entry(name, b"", type=tarfile.SYMTYPE, linkname=f"../{seen[content]}", size=0)
            seen.setdefault(content, name)
            archive.addfile(made, io.BytesIO(data))
            names.append(name)
        document = config_document(layers, config, HERE)
        manifest = [{"Config": "config.json", "RepoTags": ["test:1"], "Layers": names}]
        for name, content in (("config.json", document), ("manifest.json", json.dumps(manifest).encode())):
            made, data = entry(name, content)
            archive.addfile(made, io.BytesIO(data))
    return path


def programs(*names: str) -> Iterator[Entry]:
    """Yield programs of this host with all that they are loaded with, as a small image has them."""
    found: dict[str, Path] = {}
    for name in names:
        path = shutil.which(name)
        assert path is not None, name
        found[f"usr/bin/{name}"] = Path(path)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        for line in listed.splitlines():
            if (library := re.search(r"(/\S+) \(0x", line)) is not None:
                found[library[1].lstrip("/")] = Path(library[1])
    yield from (entry("usr"), entry("usr/bin"), entry("bin", type=tarfile.SYMTYPE, linkname="usr/bin"))
    for name, path in found.items():
        yield entry(name, path.read_bytes(), mode=stat.S_IMODE(path.stat().st_mode) | 0o555)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
