"""The commands that start the proxy: as a child process, controlled through descriptor 0 (`main.py`), or by itself."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["proxy_command", "standing_command"]

_BOOT = "import sys; sys.path.append(sys.argv[1]); from egress.main import main; main()"
_STANDING = """\
import sys, pathlib
sys.path.append(sys.argv[1])
from egress.__main__ import serve
serve(pathlib.Path(sys.argv[2]))
"""


def proxy_command() -> list[str]:
    """Return the words of it. The proxy needs this interpreter and its standard library, and nothing installed."""
    return [sys.executable, "-I", "-S", "-c", _BOOT, _package()]


def standing_command(config: Path) -> list[str]:
    """Return the words that start a proxy by a configuration."""
    return [sys.executable, "-I", "-S", "-c", _STANDING, _package(), str(config)]


def _package() -> str:
    return str(Path(__file__).resolve().parents[1])
