"""Keys and tokens taken out of text before it is written down. Pure."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["redacted"]

_HIDDEN: Final = "[redacted]"
_PATTERNS: Final = (
    (re.compile(r"(ash[st]?_[a-z2-7]{10}_)[a-z2-7]{16,}"), rf"\1{_HIDDEN}"),
    (re.compile(r"\beyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?"), _HIDDEN),
    (re.compile(r"(\bbearer\s+)[^\s,;'\"\[\]]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"(\bbasic\s+)[A-Za-z0-9+/]{16,}=*", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"(://[^\s/@:]*:)[^\s/@]+(@)"), rf"\1{_HIDDEN}\2"),
)
"""API keys, tokens of shares and tickets (their id stays, so that one can be found and revoked), JWTs, whatever is a
bearer token or goes by Basic, and passwords in URLs."""


def redacted(text: str) -> str:
    """Return `text` without what looks like a credential."""
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
