"""The hive's log: a rotating file in its log directory, and standard error; the audit has a file of its own.

Every line is written without what looks like a credential, wherever it came from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from ash_hub.serving.audit import AUDIT_LOGGER, missing_line
from ash_hub.serving.log_writers import BackgroundHandler, SharedFile, Write, write_to_stderr
from ash_hub.serving.redaction import redacted

__all__ = ["set_up"]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_FILE_BYTES: Final = 10 * 1024 * 1024
_OLDER_FILES: Final = 4
_LINES: Final = 4096
"""How many may wait to be written."""
_AUDIT_LINES: Final = 16384


log = logging.getLogger("ash.hub")


class _Fields(logging.Formatter):
    """Appends what was given as `extra`, as `key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        return redacted(line + "".join(f" {key}={value}" for key, value in extra.items()))


def set_up(directory: Path, level: str, *, to_stderr: bool) -> None:
    """Send the log of this process to `directory/hive.log` and to standard error, and its audit to `audit.log`.

    Each file is followed by up to four older ones of 10 MiB. Nobody who logs waits for any of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handlers = [_background(_file(directory / "hive.log"))]
    if to_stderr:
        handlers.append(_background(write_to_stderr))
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
    audit.addHandler(
        BackgroundHandler(
            _file(directory / "audit.log"), most=_AUDIT_LINES, missing=missing_line, on_loss=_tell_of_missing_audit
        )
    )


def _file(path: Path) -> Write:
    # what cannot be written is said now, and not at the first line
    return SharedFile(path, max_bytes=_FILE_BYTES, backups=_OLDER_FILES).write


def _background(write: Write) -> logging.Handler:
    formatter = _Fields("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler = BackgroundHandler(write, most=_LINES, missing=lambda count: formatter.format(_missing(count)))
    handler.setFormatter(formatter)
    return handler


def _missing(lines: int) -> logging.LogRecord:
    message = "%d lines are missing: they came faster than they could be written"
    return logging.LogRecord("ash.hub", logging.WARNING, __file__, 0, message, (lines,), None)


def _tell_of_missing_audit() -> None:
    log.warning("lines of the audit are missing: they cannot be written, or not as fast as they come")
