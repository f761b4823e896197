"""Following a document on a platform that does not tell of its changes."""

from __future__ import annotations

import logging
from typing import Final

import anyio

from ash_hub.backends.documents import DocumentKind, Documents, Tell
from ash_mcp.errors import AshError

__all__ = ["read_repeatedly"]

log = logging.getLogger("ash.hub")

_EVERY_SECONDS: Final = 0.5


async def read_repeatedly(documents: Documents, kind: DocumentKind, name: str, tell: Tell) -> None:
    """Follow a document as `Documents.follow` says."""
    is_away = False
    while True:
        try:
            tell(await documents.read(kind, name))
            is_away = False
        except AshError as error:
            if not is_away:
                log.error("the document %s cannot be read, and is taken to be as it was: %s", name, error.message)
            is_away = True
        await anyio.sleep(_EVERY_SECONDS)
