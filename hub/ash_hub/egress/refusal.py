"""Refusals and failures of requests, and the HTTP answers that state them. No I/O."""

from __future__ import annotations

import json

__all__ = ["STATUS_PHRASES", "Refusal", "answer"]

STATUS_PHRASES = {
    400: "Bad Request",
    403: "Forbidden",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
"""The statuses that the proxy itself answers with."""

_LONGEST_PHRASE = 200


class Refusal(Exception):
    """A request that is not let out. `reason` is a stable word, the message a sentence for a person or a model."""

    def __init__(self, reason: str, message: str, *, status: int = 403) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.status = status

    @property
    def verdict(self) -> str:
        """`refused` where a rule said no, `failed` where the way out did not work."""
        return "failed" if self.status >= 500 else "refused"


def answer(refusal: Refusal, *, policy: str, target: str | None) -> bytes:
    """Return the whole answer to a request that is not let out."""
    error = {
        "kind": f"egress_{refusal.verdict}",
        "reason": refusal.reason,
        "message": f"{refusal.message} (network policy: {policy})",
        "policy": policy,
        "target": target,
    }
    body = json.dumps({"error": error}).encode() + b"\n"
    # Clients show little of a refused CONNECT but this phrase.
    said = f"{STATUS_PHRASES[refusal.status]} (egress {refusal.verdict}: {refusal.reason}; policy: {policy})"
    phrase = "".join(letter if " " <= letter <= "~" else "?" for letter in said)[:_LONGEST_PHRASE]
    head = (
        f"HTTP/1.1 {refusal.status} {phrase}\r\n"
        f"Ash-Egress: {refusal.verdict}; reason={refusal.reason}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
