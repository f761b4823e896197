"""Images of registries are fetched by skopeo and kept; what a registry does not give is told."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ash_hub.images import ImageStore
from ash_hub.images.pull import pull
from ash_mcp.errors import CapacityExceeded, ConfigError, ConnectFailed, Unsupported
from tests.hub.images.image_parts import entry, layer, layout, needs_root, wait_until

MIB = 1024 * 1024
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")


def quiet(line: str) -> None:
    del line


@contextmanager
def registry(folder: Path) -> Generator[str]:
    """Serve a layout as a registry without TLS, and give its host and port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, last = self.path.rpartition("/")
            blobs = folder / "blobs/sha256"
            if self.path == "/v2/":
                self._answer(b"{}", "application/json")
            elif kind.endswith("/manifests") and last == "v1":
                self._answer((folder / "index.json").read_bytes(), "application/vnd.oci.image.index.v1+json")
            elif last.startswith("sha256:") and (blobs / last[7:]).is_file():
                is_manifest = kind.endswith("/manifests")
                media_type = (
                    "application/vnd.oci.image.manifest.v1+json" if is_manifest else "application/octet-stream"
                )
                self._answer((blobs / last[7:]).read_bytes(), media_type)
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def _answer(self, body: bytes, media_type: str) -> None:
            self.send_response(200)
            self.send_header("content-type", media_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store", 256 * MIB)


def test_without_skopeo_it_is_said_what_to_install(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unsupported, match="apt-get install skopeo"):
        pull(store, "python", most_bytes=MIB, said=quiet)
    with pytest.raises(ConfigError, match="no name of an image"):
        pull(store, "--help", most_bytes=MIB, said=quiet)


def test_a_killed_pull_leaves_nothing_that_fetches_on(store: ImageStore, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    (tmp_path / "skopeo").write_text(f"#!/bin/sh\necho $$ > {told}.new && mv {told}.new {told}\nexec sleep 60\n")
    (tmp_path / "skopeo").chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from ash_hub.images import ImageStore; "
        "from ash_hub.images.pull import pull; "
        "pull(ImageStore(Path(sys.argv[1]), 1 << 28), 'a', most_bytes=1 << 20, said=lambda line: None)"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.directory)], env={**os.environ, "PATH": path}
    ) as process:
        wait_until(told.exists)
        process.kill()
    fetching = Path("/proc", told.read_text().strip(), "cmdline")
    wait_until(lambda: not fetching.exists() or not fetching.read_bytes())


@needs_root
@needs_skopeo
@pytest.mark.extended
def test_an_image_of_a_registry_is_fetched_and_kept(store: ImageStore, tmp_path: Path) -> None:
    folder = layout(tmp_path / "oci", layer(entry("file", os.urandom(2 * MIB))), User="joe")
    with registry(folder) as host:
        found = pull(store, f"{host}/team/tool:v1", most_bytes=64 * MIB, insecure=True, said=quiet)
        assert (found.origin, found.config.user) == ("registry", "joe")
        assert (Path(store.roots(found)[0]) / "file").stat().st_size == 2 * MIB
        with pytest.raises(ConnectFailed, match="cannot be fetched"):
            pull(store, f"{host}/team/tool:v2", most_bytes=64 * MIB, insecure=True, said=quiet)
        with pytest.raises(CapacityExceeded):
            pull(ImageStore(tmp_path / "small", MIB), f"{host}/a:v1", most_bytes=64 * MIB, insecure=True, said=quiet)
    assert not list(store.directory.glob(".scratch-*"))
