"""Where the hive's log goes: a rotating file in its log directory, and standard error; the audit has one of its own.

Every line is written without what looks like a credential, wherever it came from.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Final

from concurrent_log_handler import ConcurrentRotatingFileHandler

from ash_hub.audit import AUDIT_LOGGER
from ash_hub.redaction import redacted

__all__ = ["set_up"]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_FILE_BYTES: Final = 10 * 1024 * 1024


class _Fields(logging.Formatter):
    """Appends what was given as `extra`, as `key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        return redacted(line + "".join(f" {key}={value}" for key, value in extra.items()))


def set_up(directory: Path, level: str, *, to_stderr: bool) -> None:
    """Send the log of this process to `directory/hive.log` and to standard error, and its audit to `audit.log`.

    Each file is followed by up to four older ones of 10 MiB.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = _rotating(directory / "hive.log")
    handlers: list[logging.Handler] = [file]
    if to_stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(_Fields("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)
    # what a client asks for is its own business: the SDK tells of every session at INFO
    for chatty in ("mcp", "httpx", "httpx2", "httpcore", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    audit = logging.getLogger(AUDIT_LOGGER)
    audit.setLevel(logging.INFO)
    audit.propagate = False
    for old in list(audit.handlers):
        audit.removeHandler(old)
        old.close()
    audit.addHandler(_rotating(directory / "audit.log"))


def _rotating(file: Path) -> logging.Handler:
    file.touch()  # what cannot be written is said now, and not at the first line
    # replicas and routers of one state directory write the same files
    return ConcurrentRotatingFileHandler(str(file), maxBytes=_FILE_BYTES, backupCount=4, encoding="utf-8")
