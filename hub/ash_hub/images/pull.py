"""Images of registries, fetched by skopeo: it knows registries, credentials (the usual auth file) and proxies."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ash_hub.images.archives import open_parts
from ash_hub.images.names import full_name
from ash_hub.images.store import Image, ImageStore
from ash_mcp.errors import CapacityExceeded, ConnectFailed, Unsupported

__all__ = ["pull"]

_SECONDS = 3600.0
_PAUSE_SECONDS = 0.2
_WORDS_BYTES = 4096
_PR_SET_PDEATHSIG = 1


def pull(
    store: ImageStore, name: str, *, most_bytes: int, insecure: bool = False, said: Callable[[str], None]
) -> Image:
    """Fetch an image from its registry and keep it.

    Args:
        most_bytes: What it may have as the registry sends it.
        insecure: Whether the registry may be without TLS.
        said: Told what is done, a line each.

    Raises:
        Unsupported: skopeo is not installed, or the image is for another machine.
        ConnectFailed: The registry does not give it.
        ConfigError, CapacityExceeded: As `ImageStore.add`.
    """
    full, program = full_name(name), shutil.which("skopeo")
    if program is None:
        raise Unsupported(
            "images of registries are fetched by skopeo, which is not installed: `sudo apt-get install skopeo`. "
            "An archive made elsewhere (`docker save`) can be imported without"
        )
    with store.scratch() as folder:
        said(f"fetching {full}")
        verify = ("--src-tls-verify=false",) if insecure else ()
        words = (program, "copy", "--quiet", *verify, f"docker://{full}", f"oci:{folder}/layout:image")
        _run(words, folder, most_bytes, store.check_disk)
        return store.add(full, open_parts(folder / "layout"), origin="registry", said=said)


def _run(words: tuple[str, ...], folder: Path, most_bytes: int, check_disk: Callable[[], None]) -> None:
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    log, deadline = folder / "log", time.monotonic() + _SECONDS
    with open(log, "wb") as output:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Nobody would bound what it fetches if this process were killed.
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
        try:
            while process.poll() is None:
                check_disk()
                if _size(folder) > most_bytes:
                    raise CapacityExceeded(f"the image has more than {most_bytes >> 20} MiB: it was not fetched")
                if time.monotonic() > deadline:
                    raise ConnectFailed(f"the image was not fetched within {_SECONDS:g} s")
                time.sleep(_PAUSE_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        said = log.read_bytes()[-_WORDS_BYTES:].decode(errors="replace").strip()
        why = "".join(said.splitlines()[-1:])
        if "no image found in" in why:
            raise Unsupported(f"the image is not for this machine, {os.uname().machine}: {why}")
        raise ConnectFailed(f"the image cannot be fetched: {why or 'skopeo failed'}")


def _size(folder: Path) -> int:
    found = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(directory, name)).st_size
            except OSError:  # renamed meanwhile
                continue
    return found
