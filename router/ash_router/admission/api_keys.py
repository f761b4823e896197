"""API keys: made once, shown once, kept as hashes in one document that a running hive reads again when it changes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

from ash_mcp.errors import ConfigError, NotFound
from ash_mcp.types import NO_LIMITS, Principal, PrincipalLimits, valid_scope
from ash_router.admission.credential_verdict import Known, Rejected
from ash_router.admission.secret_tokens import digest_of, is_token_of, new_token, token_pattern

__all__ = [
    "KEY_PATTERN",
    "KEY_PREFIX",
    "ApiKey",
    "KeyChange",
    "KeyDocument",
    "KeyFile",
    "KeyRing",
    "KeySource",
    "add_key",
    "parse_keys",
    "revoke_keys",
    "write_keys",
]

T = TypeVar("T")

log = logging.getLogger("ash.router")

KEY_PREFIX: Final = "ash_"
KEY_PATTERN: Final = token_pattern(KEY_PREFIX)

_VERSION: Final = 1
_LOOK_EVERY_SECONDS: Final = 1.0
_REJECTED: Final = Rejected("the API key is unknown, revoked or expired; ask for a new one (ash key new)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One API key as it is stored, without its secret. Times are seconds since the epoch."""

    id: str
    """The public part of the key, which lists and the audit show."""
    sha256: str
    """Of the whole key, in hexadecimal."""
    subject: str
    """The principal of its bearer; keys with one subject share their sandboxes."""
    name: str = ""
    scopes: tuple[str, ...] | None = None
    """The only scopes it may use; None means all."""
    created_at: float
    expires_at: float | None = None
    limits: PrincipalLimits = NO_LIMITS
    spawn_policy: str = ""
    """As in `Principal`."""

    @property
    def principal(self) -> Principal:
        scopes = None if self.scopes is None else frozenset(self.scopes)
        return Principal(self.subject, scopes, self.limits, self.spawn_policy)

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


KeyChange = Callable[[Sequence[ApiKey]], tuple[Sequence[ApiKey], T]]
"""Returns the changed keys, and a result, of the present keys. It may be called several times for one change."""


def add_key(
    keys: Sequence[ApiKey],
    *,
    now: float,
    name: str = "",
    subject: str | None = None,
    scopes: Collection[str] = (),
    ttl_seconds: float | None = None,
    limits: PrincipalLimits = NO_LIMITS,
    spawn_policy: str = "",
) -> tuple[list[ApiKey], tuple[ApiKey, str]]:
    """Return the keys with a new one appended, and the new one with its full text, which is stored nowhere.

    Args:
        subject: The principal of its bearer; None makes a new one.
        scopes: The only scopes that the key may use; empty allows all.
        limits: Limits of the bearer, where lower than the hive's.
        spawn_policy: What its bearer may ask for when it spawns, in the hub's own form.

    Raises:
        ConfigError: A value cannot be used.
    """
    bound = tuple(dict.fromkeys(scopes))
    _check(name, subject, bound)
    key_id, text = new_token(KEY_PREFIX)
    key = ApiKey(
        id=key_id,
        sha256=digest_of(text),
        subject=subject or f"key:{key_id}",
        name=name,
        scopes=bound or None,
        created_at=now,
        expires_at=None if ttl_seconds is None else now + ttl_seconds,
        limits=limits,
        spawn_policy=spawn_policy,
    )
    return [*keys, key], (key, text)


def revoke_keys(keys: Sequence[ApiKey], named: Collection[str]) -> tuple[list[ApiKey], list[ApiKey]]:
    """Return the remaining keys and the removed ones; `named` has the id of each, or a name that only one key has.

    Raises:
        NotFound: There is no such key.
        ConfigError: Several keys have that name.
    """
    gone = {key.id: key for key in (_find(keys, name) for name in named)}
    return [key for key in keys if key.id not in gone], list(gone.values())


def write_keys(keys: Iterable[ApiKey]) -> bytes:
    """Return the stored document of keys, as JSON."""
    return json.dumps({"version": _VERSION, "keys": [asdict(key) for key in keys]}, indent=1).encode()


def parse_keys(body: bytes, where: str) -> list[ApiKey]:
    """Return the keys of a stored document, expired ones included.

    Args:
        where: Names the document in the error.

    Raises:
        ConfigError: The document is not a list of keys.
    """
    try:
        return _parse(body)
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{where} does not hold API keys of this version; move it away and make new keys") from exc


class KeySource(Protocol):
    """The stored keys of a running hive. It is read while a request waits, and so never waits for a network itself."""

    def version(self) -> object:
        """Return a value that differs from the last one if the keys may have changed."""
        ...

    def read(self) -> list[ApiKey]:
        """Return all keys, expired ones included.

        Raises:
            ConfigError: The stored document is not a list of keys, or cannot be read.
        """
        ...


class KeyFile:
    """The file of a hive's keys. Any process of its user may change it; each change is atomic."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def read(self) -> list[ApiKey]:
        """Return all keys, expired ones included.

        Raises:
            ConfigError: The file is not a list of keys, or others can read it.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    raise ConfigError(f"others can read the hive's API keys; run: chmod 600 {self.path}")
                body = file.read()
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise ConfigError(f"the API keys in {self.path} cannot be read: {exc.strerror}") from exc
        return parse_keys(body, str(self.path))

    def version(self) -> object:
        return _signature(self.path)

    def change(self, change: KeyChange[T]) -> T:
        """Apply `change` to the keys under a lock, and return its result.

        Raises:
            ConfigError: The file cannot be read or written.
        """
        with self._alone():
            keys, result = change(self.read())
            self._write(keys)
        return result

    def add(self, **given: Any) -> tuple[ApiKey, str]:
        """Make a key as `add_key` does."""
        return self.change(lambda keys: add_key(keys, now=self._clock(), **given))

    def revoke(self, named: Collection[str]) -> list[ApiKey]:
        """Remove keys as `revoke_keys` does."""
        return self.change(lambda keys: revoke_keys(keys, named))

    @contextmanager
    def _alone(self) -> Generator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"the API keys in {self.path} cannot be changed: {exc.strerror}") from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, keys: Iterable[ApiKey]) -> None:
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(write_keys(keys))
                file.flush()
                os.fsync(descriptor)
            fresh.replace(self.path)
        except OSError as exc:
            fresh.unlink(missing_ok=True)
            raise ConfigError(f"the API keys in {self.path} cannot be changed: {exc.strerror}") from exc


class KeyDocument:
    """The keys as one document that the backend keeps for all replicas.

    Args:
        body: The document as it is; None where there is none.
    """

    def __init__(self, body: bytes | None) -> None:
        self._body = body

    def take(self, body: bytes | None) -> None:
        """Take note of the document as it is now."""
        self._body = body

    def version(self) -> object:
        return self._body

    def read(self) -> list[ApiKey]:
        return parse_keys(self._body, "the hive's document of API keys") if self._body is not None else []


class KeyRing:
    """The keys of a running hive: a `Verifier` that follows their source within about a second.

    A source that has become unreadable leaves the last keys valid, with a line in the log: a mistake in a file must
    not lock all callers out. A file that was removed revokes all keys.
    """

    def __init__(
        self,
        source: KeySource,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._clock = clock
        self._monotonic = monotonic
        self._seen = source.version()
        self._looked_at = monotonic()
        self._keys = {key.id: key for key in source.read()}

    def takes(self, token: str) -> bool:
        return token.startswith(KEY_PREFIX)

    def verify(self, token: str) -> Known | Rejected:
        self._follow()
        match = KEY_PATTERN.fullmatch(token)
        key = self._keys.get(match["id"]) if match is not None else None
        # an unknown key costs what a known one does
        good = is_token_of(token, None if key is None else key.sha256)
        if key is None or not good or key.expired(self._clock()):
            return _REJECTED
        return Known(key.principal, f"key:{key.id}")

    def has_ended(self, by: str) -> bool:
        """Return whether a credential, as `Known.by` names it, is a key that was revoked or has expired."""
        if not by.startswith("key:"):
            return False
        self._follow()
        key = self._keys.get(by.removeprefix("key:"))
        return key is None or key.expired(self._clock())

    def usable(self) -> int:
        """Return how many keys are not expired."""
        self._follow()
        now = self._clock()
        return sum(not key.expired(now) for key in self._keys.values())

    def _follow(self) -> None:
        now = self._monotonic()
        if now - self._looked_at < _LOOK_EVERY_SECONDS:
            return
        self._looked_at = now
        seen = self._source.version()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = {key.id: key for key in self._source.read()}
        except ConfigError as error:
            log.error("the API keys are as they were before: %s", error.message)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ino, about.st_size


def _parse(raw: bytes) -> list[ApiKey]:
    body = json.loads(raw)
    if body["version"] != _VERSION:
        raise ValueError("another version")
    return [_from_fields(cast("dict[str, Any]", fields)) for fields in body["keys"]]


def _from_fields(fields: dict[str, Any]) -> ApiKey:
    scopes, limits = fields.pop("scopes", None), fields.pop("limits", {})
    return ApiKey(**fields, scopes=None if scopes is None else tuple(scopes), limits=PrincipalLimits(**limits))


def _check(name: str, subject: str | None, scopes: Iterable[str]) -> None:
    for what, value in (("name", name), ("subject", subject or "")):
        if len(value) > 200 or not value.isprintable():
            raise ConfigError(f"a key's {what} is at most 200 printable characters")
    for scope in scopes:
        if not valid_scope(scope):
            raise ConfigError(f"{scope!r} cannot be a scope: letters, digits and ._- only, at most 64")


def _find(keys: Iterable[ApiKey], name: str) -> ApiKey:
    found = [key for key in keys if name in (key.id, key.name)]
    if not found:
        raise NotFound(f"there is no key {name!r}; `ash key list` shows those that there are")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} keys are named {name!r}; say which by id: {', '.join(k.id for k in found)}")
    return found[0]
