"""The command that starts the proxy as a child process, which is controlled through descriptor 0 (`main.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["proxy_command"]

_BOOT = "import sys; sys.path.append(sys.argv[1]); from egress.main import main; main()"


def proxy_command() -> list[str]:
    """Return the words of it. The proxy needs this interpreter and its standard library, and nothing installed."""
    return [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).resolve().parents[1])]
