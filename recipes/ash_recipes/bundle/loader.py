"""The bundle's loader: the host's, changed so that it reads no file of the root that it runs in.

A dynamic loader has paths compiled in. `--inhibit-cache` and `--library-path` do away with the cache and with
LD_LIBRARY_PATH, but a file /etc/ld.so.preload and the system's library directories stay, and belong to the image.
In the copy the names of files are empty, which to the kernel is a file that is not there, and the directories are
/proc, where nobody can make one, and for the shortest /dev, which sandboxes have read-only.
"""

from __future__ import annotations

import re
import struct

__all__ = ["interpreter_of", "machine_of", "sealed_loader"]

_FILES = (b"/etc/ld.so.preload\0", b"/etc/ld.so.cache\0")
_DIRECTORIES = re.compile(rb"\0((?:/(?:usr/)?lib[\w-]*/(?:[\w.-]+/)?\0){2,})")
"""The table of the system's directories: their names one after the other."""
_INTERPRETER = 3
_MACHINES = {62: "x86_64", 183: "aarch64"}


def sealed_loader(program: bytes) -> bytes:
    """Return a copy of a loader of the GNU C library that looks for libraries nowhere but where it is told.

    Raises:
        ValueError: It is no such loader.
    """
    for name in _FILES:
        if b"\0" + name not in program:
            raise ValueError(f"it does not name {name[:-1].decode()}: only the GNU C library's loader can be bundled")
        program = program.replace(b"\0" + name, b"\0" * (len(name) + 1))
    found = _DIRECTORIES.search(program)
    if found is None:
        raise ValueError("its library directories are not where the GNU C library has them")
    names = b"".join(_nowhere(len(name)) + b"\0" for name in found[1].split(b"\0")[:-1])
    return program.replace(found[1], names)


def _nowhere(length: int) -> bytes:
    """Return the name of a directory in which nobody can make a file, of that length and with a slash at its end."""
    return b"/proc/".ljust(length, b"/") if length > 5 else b"/dev/"  # as short as /lib/ is


def machine_of(program: bytes) -> str:
    """Return what an ELF file runs on, as `uname -m` says it."""
    (number,) = struct.unpack_from("<H", program, 18)
    return _MACHINES.get(number, f"ELF machine {number}")


def interpreter_of(program: bytes) -> str | None:
    """Return the loader that an ELF file of 64 bits names; None where it names none."""
    (table,) = struct.unpack_from("<Q", program, 32)
    size, count = struct.unpack_from("<HH", program, 54)
    for number in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", program, table + number * size)
        if kind == _INTERPRETER:
            return program[offset : offset + length].rstrip(b"\0").decode()
    return None
