"""Image layers and the runner's bundle on this host, for sandboxes from images; the bundle is built once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread

from ash_hub.backends.checks import Check
from ash_hub.backends.local.image_plans import ImageRoot, bundle_runtime
from ash_hub.backends.local.keeper.used_directories import hold, remove_unused
from ash_hub.backends.local.runtime import Runtime
from ash_hub.backends.local.settings import LocalSettings
from ash_hub.images import ImageStore
from ash_mcp.errors import ConfigError, StartFailed, Unsupported

__all__ = ["LocalImages", "build_bundle", "image_check", "image_store", "unsupported"]

_BUILD_SECONDS = 600.0
_BUNDLES = "bundles"
_SPARE_BUNDLES = 1


def image_store(settings: LocalSettings) -> ImageStore:
    """Return the images of this host's hives."""
    return ImageStore(_directory(settings), settings.image_bytes)


def _directory(settings: LocalSettings) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return settings.image_dir or Path(cache, "ash", "images")


def build_bundle(settings: LocalSettings) -> Path:
    """Return the runner's bundle for the hub's own Python; built if it is not there, which takes some time.

    Raises:
        StartFailed: It cannot be built.
    """
    words = [sys.executable, "-P", "-m", "ash_recipes.bundle", "--into", str(_directory(settings) / _BUNDLES)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise StartFailed(f"the runner's bundle was not built within {_BUILD_SECONDS:g} s", step="bundle") from None
    if done.returncode:
        why = "".join(done.stderr.strip().splitlines()[-1:])
        raise StartFailed(f"the runner's bundle cannot be built: {why}", step="bundle")
    return Path(done.stdout.strip())


def image_check(settings: LocalSettings, *, has_machines: bool) -> Check:
    """Return what `ash doctor` says of images.

    Args:
        has_machines: Whether sandboxes have users and a root of their own.
    """
    if os.geteuid() != 0 or not has_machines:
        why = "only ordinary machines of a hive that root runs can begin as an image"
        return Check("images", False, f"sandboxes cannot be started from any: {why}", "run the hive as root")
    by = "registries' by skopeo" if shutil.which("skopeo") else "of archives alone, as skopeo is not installed"
    count = len(image_store(settings).list())
    return Check("images", True, f"sandboxes can be started from any for {os.uname().machine}; {count} here, {by}")


class LocalImages:
    """The images that one hub starts sandboxes from."""

    def __init__(self, settings: LocalSettings) -> None:
        self._settings = settings
        self._store = image_store(settings)
        self._building = anyio.Lock()
        self._runtime: Runtime | None = None
        self._held: int | None = None

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            os.close(held)

    async def find(self, name: str) -> ImageRoot:
        """Return an image that is here.

        Raises:
            ConfigError: It is not, or that is no name.
        """
        found = await anyio.to_thread.run_sync(self._store.find, name)
        if found is None:
            raise ConfigError(
                f"there is no image {name!r} on this host: `ash image import ARCHIVE {name}` or `ash image pull "
                f"{name}` brings it, `ash image list` shows those that there are"
            )
        return ImageRoot(image=found, layers=self._store.roots(found), in_use=self._store.used(found))

    async def runtime(self) -> Runtime:
        """Return the bundle as a runtime; the first call may build it.

        Raises:
            StartFailed: It cannot be built.
        """
        async with self._building:
            if self._runtime is None:
                bundle = await anyio.to_thread.run_sync(build_bundle, self._settings, abandon_on_cancel=True)
                try:
                    self._held = hold(str(bundle))
                except OSError as error:
                    raise StartFailed("the runner's bundle was just removed; spawn again", step="bundle") from error
                remove_unused(bundle.parent, bundle.name, spare=_SPARE_BUNDLES, fresh_seconds=_BUILD_SECONDS)
                self._runtime = bundle_runtime(bundle)
            return self._runtime


def unsupported(name: str, why: str) -> Unsupported:
    """Return the error for an image where this host can run none."""
    return Unsupported(
        f"this hive cannot start image {name!r}, for its sandboxes have no root of their own: {why}. Leave `image` "
        "out and choose a recipe, or see docs/images.md"
    )
