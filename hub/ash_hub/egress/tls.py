"""The server name that a TLS client asks for, read from what it sends first. No I/O.

Where a policy names domains, the name in the ClientHello must be the one that was asked of the proxy; otherwise a
server that serves many sites would be a way to those that are not listed. Anything unclear is refused: a hello without
a name, with several, with an encrypted one (which hides a second name), and bytes that are not TLS at all.

A server may answer by asking for a second hello (HelloRetryRequest), whose name counts as much as the first. So the
client's records go on one by one until there can be no other hello: the first, whole; nothing more before the server
has answered; and, if it asked again, all up to the second. That holds back early data for one round trip, and breaks
nothing, since no server waits for early data with its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from .refusal import Refusal

__all__ = [
    "ALERT",
    "LONGEST_HELLO",
    "RECORD_HEAD",
    "ClientHello",
    "asks_again",
    "check_hello",
    "read_hello",
    "record_length",
]

LONGEST_HELLO = 32 * 1024
"""Of the handshake message; with large post-quantum keys it has about 2 KiB."""
ALERT = bytes.fromhex("15 0303 0002 02 31")
"""A fatal alert, `access_denied`: clients show it instead of a broken connection."""

RECORD_HEAD = 5
"""Bytes of a record before its content."""

_LONGEST_RECORD = 16_384 + 256
"""What encryption may add is in it."""
_MOST_RECORDS = 16
_MOST_EXTENSIONS = 64
"""There are fewer than that; reading thousands would keep others waiting."""
_CHANGE_CIPHER, _TLS_ALERT, _HANDSHAKE, _APPLICATION = 20, 21, 22, 23
_FATAL, _LONGEST_ALERT = 2, 2
_CLIENT_HELLO, _SERVER_HELLO = 1, 2
_SERVER_NAME, _EARLY_DATA, _ENCRYPTED_HELLO, _ENCRYPTED_NAME = 0, 42, 0xFE0D, 0xFFCE
_RETRY_RANDOM = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
_RANDOM_AT = 4 + 2
_SERVER_HELLO_BYTES = _RANDOM_AT + len(_RETRY_RANDOM)


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What matters of a ClientHello."""

    server_name: str | None
    encrypted: bool
    """Whether it carries another, encrypted hello."""
    early_data: bool = False
    """Whether application data may follow it before the server has answered."""


def check_hello(hello: ClientHello, name: str, *, encrypted: bool = False) -> None:
    """Require that `hello` asks for `name`, and for nothing that cannot be seen unless `encrypted` allows that.

    Raises:
        Refusal: It does not.
    """
    if hello.encrypted and not encrypted:
        message = (
            "the TLS client may hide the name it asks for: turn off Encrypted Client Hello, or let the hive allow it"
        )
        raise Refusal("encrypted_hello", message)
    if hello.server_name is None:
        raise Refusal("no_server_name", "the TLS client does not say which server it asks for")
    if hello.server_name.lower() != name:
        raise Refusal("server_name", f"the TLS client asks for another server than {name}")


def read_hello(data: bytes, first: ClientHello | None = None) -> ClientHello | None:
    """Return the ClientHello that `data` ends with; None if there is not enough of it yet.

    Before a second hello, a client may have sent a change of cipher, and early data if the `first` one announced it;
    the server passes over both.

    Raises:
        Refusal: `data` is not the beginning of a TLS handshake, or goes on behind the hello.
    """
    passed_over = _before_second(first)
    message, at = bytearray(), 0
    for _ in range(_MOST_RECORDS):
        head = data[at : at + RECORD_HEAD]
        _check_kind(head)
        if len(head) < RECORD_HEAD:
            return None
        end = at + RECORD_HEAD + record_length(head)
        if head[0] == _HANDSHAKE:
            message += data[at + RECORD_HEAD : end]
            if found := _whole(message):
                if len(data) > end:
                    raise _not_tls()
                return _parsed(_Cursor(found))
        elif message or head[0] not in passed_over:
            raise _not_tls()
        if len(data) < end:
            return None
        at = end
    raise _not_tls()


def _before_second(first: ClientHello | None) -> frozenset[int]:
    if first is None:
        return frozenset()
    return frozenset({_CHANGE_CIPHER, _APPLICATION} if first.early_data else {_CHANGE_CIPHER})


def record_length(head: bytes) -> int:
    """Return how many bytes follow the head of a client's record.

    Raises:
        Refusal: It is none, or of a kind that does not come before a hello.
    """
    _check_kind(head)
    length = int.from_bytes(head[3:])
    if not 0 < length <= _LONGEST_RECORD or (head[0] == _CHANGE_CIPHER and length != 1):
        raise _not_tls()
    return length


def _check_kind(head: bytes) -> None:
    """Check as much of a record's head as there is."""
    if (head and head[0] not in (_HANDSHAKE, _CHANGE_CIPHER, _APPLICATION)) or head[1:2] not in (b"", b"\x03"):
        raise _not_tls()


def _whole(message: bytearray) -> bytes | None:
    """Return the body of a complete ClientHello."""
    if message and message[0] != _CLIENT_HELLO:
        raise _not_tls()
    if len(message) < 4:
        return None
    size = int.from_bytes(message[1:4])
    if size > LONGEST_HELLO or len(message) > 4 + size:
        raise _not_tls()
    return bytes(message[4:]) if len(message) == 4 + size else None


class _Cursor:
    """Reads a message from its beginning to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _not_tls()
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width))

    def vector(self, width: int) -> _Cursor:
        return _Cursor(self.take(self.number(width)))


def _parsed(hello: _Cursor) -> ClientHello:
    hello.take(2 + 32)
    for width in (1, 2, 1):  # session id, cipher suites, compression methods
        hello.vector(width)
    extensions = hello.vector(2) if hello.left else _Cursor(b"")
    if hello.left:
        raise _not_tls()
    name: str | None = None
    seen: set[int] = set()
    while extensions.left:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in seen or len(seen) == _MOST_EXTENSIONS:
            raise _not_tls()
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _server_name(content)
    return ClientHello(name, bool(seen & {_ENCRYPTED_HELLO, _ENCRYPTED_NAME}), _EARLY_DATA in seen)


def _server_name(content: _Cursor) -> str:
    """Return the only name of the extension."""
    names = content.vector(2)
    kind, name = names.number(1), names.vector(2)
    text = name.take(name.left)
    if kind != 0 or names.left or content.left or not text.isascii():
        raise _not_tls()
    return text.decode("ascii")


def asks_again(data: bytes) -> bool | None:
    """Say whether a server's first bytes are a HelloRetryRequest; None if there are too few to tell.

    Raises:
        Refusal: It says too much beside it.
    """
    message, at = b"", 0
    for _ in range(_MOST_RECORDS):
        head = data[at : at + RECORD_HEAD]
        if head and head[0] not in (_HANDSHAKE, _CHANGE_CIPHER, _TLS_ALERT):
            return False
        if len(head) < RECORD_HEAD:
            return None
        length = int.from_bytes(head[3:])
        end = at + RECORD_HEAD + length
        content = data[at + RECORD_HEAD : end]
        if head[0] != _HANDSHAKE and length > _LONGEST_ALERT:
            return False
        if head[0] == _TLS_ALERT and content[:1] == bytes([_FATAL]):
            return False
        if head[0] == _HANDSHAKE:
            message += content
            if message[:1] not in (b"", bytes([_SERVER_HELLO])):
                return False
            if len(message) >= _SERVER_HELLO_BYTES:
                return message[_RANDOM_AT:_SERVER_HELLO_BYTES] == _RETRY_RANDOM
        if len(data) < end:
            return None
        at = end
    raise _not_tls()


def _not_tls() -> Refusal:
    return Refusal("not_tls", "a tunnel to a named domain carries TLS only, beginning with a well-formed ClientHello")
