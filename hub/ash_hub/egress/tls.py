"""The server name that a TLS client asks for, read from what it sends first. No I/O.

Where a policy names domains, the name in the ClientHello must be the one that was asked of the proxy; otherwise a
server that serves many sites would be a way to those that are not listed. Anything unclear is refused: a hello without
a name, with several, with an encrypted one (which hides a second name), and bytes that are not TLS at all. A server
may answer by asking for a second hello (HelloRetryRequest), whose name counts as much as the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from .refusal import Refusal

__all__ = ["ALERT", "LONGEST_HELLO", "ClientHello", "asks_again", "check_hello", "read_hello"]

LONGEST_HELLO = 32 * 1024
"""Of the handshake message; with large post-quantum keys it has about 2 KiB."""
ALERT = bytes.fromhex("15 0303 0002 02 31")
"""A fatal alert, `access_denied`: clients show it instead of a broken connection."""

_RECORD_HEAD = 5
_LONGEST_RECORD = 16_384
_MOST_RECORDS = 16
_CHANGE_CIPHER, _HANDSHAKE = 20, 22
_CLIENT_HELLO, _SERVER_HELLO = 1, 2
_SERVER_NAME, _ENCRYPTED_HELLO, _ENCRYPTED_NAME = 0, 0xFE0D, 0xFFCE
_RETRY_RANDOM = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
_RANDOM_AT = _RECORD_HEAD + 4 + 2
_SERVER_HELLO_BYTES = _RANDOM_AT + len(_RETRY_RANDOM)


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What matters of a ClientHello."""

    server_name: str | None
    encrypted: bool
    """Whether it carries another, encrypted hello."""


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


def read_hello(data: bytes) -> ClientHello | None:
    """Return the ClientHello that `data` begins with; None if there is not enough of it yet.

    Change-cipher-spec records before it are passed over: clients send one before a second hello.

    Raises:
        Refusal: `data` is not the beginning of a TLS handshake.
    """
    message, at = bytearray(), 0
    for _ in range(_MOST_RECORDS):
        if len(data) <= at:
            return None
        kind, length = _record(data[at : at + _RECORD_HEAD])
        body = data[at + _RECORD_HEAD : at + _RECORD_HEAD + length]
        at += _RECORD_HEAD + length
        if kind == _HANDSHAKE:
            message += body
            if found := _whole(message):
                return _parsed(_Cursor(found))
        elif message:
            raise _not_tls()
        if length == 0 or len(data) < at:
            return None
    raise _not_tls()


def _record(head: bytes) -> tuple[int, int]:
    """Return kind and length of a record; a length of 0 while its head is not all there."""
    if head[0] not in (_HANDSHAKE, _CHANGE_CIPHER) or head[1:2] not in (b"", b"\x03"):
        raise _not_tls()
    if len(head) < _RECORD_HEAD:
        return head[0], 0
    length = int.from_bytes(head[3:5])
    if not 0 < length <= _LONGEST_RECORD or (head[0] == _CHANGE_CIPHER and length != 1):
        raise _not_tls()
    return head[0], length


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
        if kind in seen:
            raise _not_tls()
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _server_name(content)
    return ClientHello(name, bool(seen & {_ENCRYPTED_HELLO, _ENCRYPTED_NAME}))


def _server_name(content: _Cursor) -> str:
    """Return the only name of the extension."""
    names = content.vector(2)
    kind, name = names.number(1), names.vector(2)
    text = name.take(name.left)
    if kind != 0 or names.left or content.left or not text.isascii():
        raise _not_tls()
    return text.decode("ascii")


def asks_again(data: bytes) -> bool | None:
    """Say whether a server's first bytes are a HelloRetryRequest; None if there are too few to tell."""
    if data[:1] not in (b"", bytes([_HANDSHAKE])):
        return False
    if len(data) < _SERVER_HELLO_BYTES:
        return None
    is_hello = data[_RECORD_HEAD] == _SERVER_HELLO
    return is_hello and data[_RANDOM_AT:_SERVER_HELLO_BYTES] == _RETRY_RANDOM


def _not_tls() -> Refusal:
    return Refusal("not_tls", "a tunnel to a named domain carries TLS only, beginning with a well-formed ClientHello")
