"""Bait on the host for hostile code to find: laid before the attempts, taken up after them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["Bait", "lay_bait"]

_IPC_CREATE, _IPC_REMOVE = 0o1000 | 0o2000, 0
_SHARED_BYTES = 4096
_SYSTEM_FILES = ("/usr", "/usr/bin/env", "/etc/ld.so.cache", "/etc/localtime")
_DEVICE = "/dev/full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bait:
    """Things of the host, each with the same secret in it, and where they are."""

    secret: str
    file: str
    """Readable by everybody, in the host's /tmp."""
    home: str
    """A directory like a user's home, with the secret in `.ssh/id`."""
    pid: int
    """A process of the hive's own user with the secret in its arguments and environment."""
    port: int
    """On loopback; answers HTTP with 200 and the secret, and `/to?URL` with a redirect to the URL."""
    abstract: str
    """Name of an abstract Unix socket, without the NUL."""
    shared_memory: int
    """A System V key, 0 where the host gives none."""
    hostname: str
    locked: tuple[str, ...]
    """Files of the host's system on which a lock is held."""
    locked_device: str
    """A device node on which one is held."""

    def to_json(self, **more: Any) -> Mapping[str, Any]:
        return {**asdict(self), **more}


@contextmanager
def lay_bait() -> Generator[Bait]:
    """Lay everything out on this host and remove it at the end."""
    secret = f"bait-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ash-bait-", dir="/tmp"))) / "secret"
        file.parent.chmod(0o755)
        file.write_text(secret)
        file.chmod(0o644)
        home = file.with_name("home")
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "id").write_text(secret)
        yield Bait(
            secret=secret,
            file=str(file),
            home=str(home),
            pid=stack.enter_context(_process(secret)),
            port=stack.enter_context(_web_server(secret)),
            abstract=stack.enter_context(_abstract_socket(secret)),
            shared_memory=stack.enter_context(_shared_memory(secret)),
            hostname=socket.gethostname(),
            locked=tuple(path for path in _SYSTEM_FILES if stack.enter_context(_locked(path))),
            locked_device=_DEVICE if stack.enter_context(_locked(_DEVICE)) else "",
        )


@contextmanager
def _process(secret: str) -> Generator[int]:
    words = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()", secret]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env={"SECRET": secret, "PATH": os.defpath})
    try:
        yield process.pid
    finally:
        process.communicate(b"")


@contextmanager
def _web_server(secret: str) -> Generator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, url = self.path.partition("?")
            if path == "/to":
                self.send_response(302)
                self.send_header("Location", url)
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(secret.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _locked(path: str) -> Generator[bool]:
    """Hold locks, of both kinds, that hinder nobody who only reads; say whether there is such a file."""
    if not os.path.exists(path):
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
        yield True
    finally:
        os.close(descriptor)


@contextmanager
def _abstract_socket(secret: str) -> Generator[str]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{secret}")
        listener.listen()
        yield secret


@contextmanager
def _shared_memory(secret: str) -> Generator[int]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    key = secrets.randbelow(2**30) + 1
    number = libc.shmget(key, _SHARED_BYTES, _IPC_CREATE | 0o666)
    if number < 0:
        yield 0
        return
    try:
        address = libc.shmat(number, None, 0)
        ctypes.memmove(address, secret.encode(), len(secret))
        libc.shmdt(ctypes.c_void_p(address))
        yield key
    finally:
        libc.shmctl(number, _IPC_REMOVE, None)
