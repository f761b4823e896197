"""Checks of a backend's documents, part of `check_backend`. Each takes those of two replicas of one hive, empty."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from ash_hub.backends.documents import MAX_DOCUMENT_BYTES, DocumentKind, Documents
from ash_mcp.errors import Conflict

__all__ = ["DOCUMENT_CHECKS", "who_follows_a_document_is_told_what_it_is_and_becomes"]

_SETS = DocumentKind.TOOLSETS
_KEYS = DocumentKind.KEYS
_FOLLOW_SECONDS = 2.0
_HOSTILE = (
    "",
    ".",
    "..",
    "../keys",
    "a/b",
    "/etc/passwd",
    "A",
    "a.b",
    "a_b",
    "-a",
    "a-",
    "a\n",
    "a\0",
    "é",
    "a" * 101,
)


async def a_document_is_read_by_every_replica(one: Documents, other: Documents) -> None:
    body = bytes(range(256))
    assert await other.read(_SETS, "a") is None and dict(await other.used(_SETS)) == {}
    await one.keep(_SETS, "a", body)
    for documents in (one, other):
        assert await documents.read(_SETS, "a") == body
        assert set(await documents.used(_SETS)) == {"a"}
        assert await documents.read(_SETS, "b") is None


async def the_first_body_of_a_document_stays(one: Documents, other: Documents) -> None:
    async with anyio.create_task_group() as group:
        for _ in range(4):
            for documents in (one, other):
                group.start_soon(documents.keep, _SETS, "a", b"first")
    await other.keep(_SETS, "a", b"second")
    assert await one.read(_SETS, "a") == b"first"


async def what_is_kept_again_is_not_dropped(one: Documents, other: Documents) -> None:
    await one.keep(_SETS, "a", b"x")
    before = (await other.used(_SETS))["a"]
    await anyio.sleep(0.01)  # the platform's clock must have gone on
    await one.keep(_SETS, "a", b"x")
    after = (await one.used(_SETS))["a"]
    assert after > before
    await other.drop(_SETS, "a", used_at=before)
    assert await one.read(_SETS, "a") == b"x"
    for documents in (other, one):
        await documents.drop(_SETS, "a", used_at=after)
        assert await documents.read(_SETS, "a") is None and dict(await documents.used(_SETS)) == {}
    await one.keep(_SETS, "a", b"y")
    assert await other.read(_SETS, "a") == b"y"


async def whoever_knows_the_last_body_replaces_it(one: Documents, other: Documents) -> None:
    await one.replace(_KEYS, "keys", b"1", instead_of=None)
    await _conflicts(other.replace(_KEYS, "keys", b"2", instead_of=None))
    await other.replace(_KEYS, "keys", b"2", instead_of=b"1")
    await _conflicts(one.replace(_KEYS, "keys", b"3", instead_of=b"1"))
    assert await one.read(_KEYS, "keys") == b"2"
    assert set(await one.used(_KEYS)) == {"keys"} and dict(await one.used(_SETS)) == {}


async def of_all_who_make_a_document_one_makes_it(one: Documents, other: Documents) -> None:
    made: list[bytes] = []

    async def make(documents: Documents, body: bytes) -> None:
        try:
            await documents.replace(_KEYS, "hive", body, instead_of=None)
        except Conflict:
            return
        made.append(body)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(make, (one, other)[number % 2], b"%d" % number)
    assert len(made) == 1 and await one.read(_KEYS, "keys") is None
    for documents in (one, other):
        assert await documents.read(_KEYS, "hive") == made[0] and set(await documents.used(_KEYS)) == {"hive"}


async def of_those_who_replace_at_once_one_wins(one: Documents, other: Documents) -> None:
    await one.replace(_KEYS, "keys", b"0", instead_of=None)
    won: list[bytes] = []

    async def replace(documents: Documents, body: bytes) -> None:
        try:
            await documents.replace(_KEYS, "keys", body, instead_of=b"0")
        except Conflict:
            return
        won.append(body)

    async with anyio.create_task_group() as group:
        for number in range(1, 4):
            group.start_soon(replace, one, b"%d" % number)
            group.start_soon(replace, other, b"1%d" % number)
    assert len(won) == 1 and await one.read(_KEYS, "keys") == won[0]


async def who_follows_a_document_is_told_what_it_is_and_becomes(one: Documents, other: Documents) -> None:
    told: list[bytes | None] = []
    news = anyio.Event()

    def tell(body: bytes | None) -> None:
        nonlocal news
        if not told or told[-1] != body:
            told.append(body)
            news.set()
            news = anyio.Event()

    async def wait_for(*bodies: bytes | None) -> None:
        with anyio.fail_after(_FOLLOW_SECONDS):
            while told != list(bodies):
                await news.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(other.follow, _KEYS, "keys", tell)
        await wait_for(None)
        await one.replace(_KEYS, "hive", b"0", instead_of=None)
        await one.replace(_KEYS, "keys", b"1", instead_of=None)
        await wait_for(None, b"1")
        await one.replace(_KEYS, "keys", b"2", instead_of=b"1")
        await wait_for(None, b"1", b"2")
        await one.drop(_KEYS, "keys", used_at=(await one.used(_KEYS))["keys"])
        await wait_for(None, b"1", b"2", None)
        group.cancel_scope.cancel()


async def no_name_leads_elsewhere_and_no_body_is_too_large(one: Documents, other: Documents) -> None:
    for name in _HOSTILE:
        await _refused(one.read(_SETS, name))
        await _refused(one.keep(_SETS, name, b"x"))
        await _refused(one.replace(_KEYS, name, b"x", instead_of=None))
        await _refused(one.drop(_SETS, name, used_at=0.0))
    await _refused(one.replace(_KEYS, "others", b"x", instead_of=None))
    await _refused(one.keep(_SETS, "a", bytes(MAX_DOCUMENT_BYTES + 1)))
    await one.keep(_SETS, "a" * 64, bytes(MAX_DOCUMENT_BYTES))
    assert await other.read(_SETS, "a" * 64) == bytes(MAX_DOCUMENT_BYTES)
    assert set(await other.used(_SETS)) == {"a" * 64} and dict(await other.used(_KEYS)) == {}


async def _conflicts(step: Awaitable[None]) -> None:
    try:
        await step
    except Conflict:
        return
    raise AssertionError("a document was replaced by one who knew an older one")


async def _refused(step: Awaitable[object]) -> None:
    try:
        await step
    except ValueError:
        return
    raise AssertionError("a name or a body that no document may have was taken")


DOCUMENT_CHECKS: tuple[Callable[[Documents, Documents], Awaitable[None]], ...] = (
    a_document_is_read_by_every_replica,
    the_first_body_of_a_document_stays,
    what_is_kept_again_is_not_dropped,
    whoever_knows_the_last_body_replaces_it,
    of_those_who_replace_at_once_one_wins,
    of_all_who_make_a_document_one_makes_it,
    who_follows_a_document_is_told_what_it_is_and_becomes,
    no_name_leads_elsewhere_and_no_body_is_too_large,
)
