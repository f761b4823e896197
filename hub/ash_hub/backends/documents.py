"""The hive's own documents: what any replica must find again after every hub and the store have forgotten.

A backend keeps them where it keeps its records of sandboxes. They are few and small: pinned toolsets, and keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, Protocol

__all__ = ["MAX_DOCUMENT_BYTES", "DocumentKind", "Documents", "Tell", "check_document", "is_document_name"]

MAX_DOCUMENT_BYTES: Final = 1024 * 1024
"""Of one document: as much as the Kubernetes API takes in a ConfigMap."""

Tell = Callable[[bytes | None], None]
"""Is told what a document is now; None: there is none."""

_KEY_NAMES: Final = ("hive", "keys", "egress")
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,98}[a-z0-9])?")


class DocumentKind(StrEnum):
    TOOLSETS = "toolsets"
    """Named by the hash of their content; what is there under a name never changes."""
    KEYS = "keys"
    """Secret. `keys`: the hive's API keys, replaced whole. `hive`: its own private key, made once.
    `egress`: what it and its egress proxies share, made once."""


class Documents(Protocol):
    """Where a backend keeps the hive's documents; every replica sees the same ones.

    Whatever is asked of it raises `ConnectFailed`, retryable, where the platform does not answer or cannot do it now,
    and ValueError for a name or a size that no document may have (`check_document`).
    """

    async def read(self, kind: DocumentKind, name: str) -> bytes | None:
        """Return a document, or None where there is none of that name."""
        ...

    async def follow(self, kind: DocumentKind, name: str, tell: Tell) -> None:
        """Tell what a document is, and again within a second of each change, until cancelled.

        While the platform does not answer nothing is told, and the log has a line that says so.
        """
        ...

    async def keep(self, kind: DocumentKind, name: str, body: bytes) -> None:
        """Keep a document that never changes, and note that it is used now; the body that came first stays."""
        ...

    async def replace(self, kind: DocumentKind, name: str, body: bytes, *, instead_of: bytes | None) -> None:
        """Put a document in the place of the one that the caller read; None: there was none.

        Raises:
            Conflict: Another one is there by now; read it and try again.
        """
        ...

    async def used(self, kind: DocumentKind) -> Mapping[str, float]:
        """Return the names of all documents of a kind, and when each was last kept: seconds of the backend's time."""
        ...

    async def drop(self, kind: DocumentKind, name: str, *, used_at: float) -> None:
        """Remove a document unless it was kept again since `used_at`, as `used` said it; idempotent.

        The look and the removal are one step: whoever keeps it at the same moment has it afterwards.
        """
        ...


def is_document_name(kind: DocumentKind, name: str) -> bool:
    """Say whether a document of this kind may be called so."""
    return _NAME.fullmatch(name) is not None and (kind is not DocumentKind.KEYS or name in _KEY_NAMES)


def check_document(kind: DocumentKind, name: str, body: bytes = b"") -> None:
    """Refuse what no document may be called, or may hold.

    Raises:
        ValueError: The name could mean something to a platform, or the body is over `MAX_DOCUMENT_BYTES`.
    """
    if not is_document_name(kind, name):
        raise ValueError(f"{name[:100]!r} is no name of a document of the kind {kind}")
    if len(body) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"a document of {len(body)} bytes is over {MAX_DOCUMENT_BYTES}")
