"""Who changes a tool list is answered when its own client has fetched it, and each listener is told once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from mcp_types import SubscriptionFilter, SubscriptionsListenRequestParams

from ash_hub.face.notices import ClientKey, Notices
from ash_mcp.types import DEFAULT_SCOPE, EVERY_SCOPE, Scope
from ash_router.store.memory import MemoryStore

pytestmark = pytest.mark.anyio

SESSION = "a-session"
MODERN: ClientKey = ("ann", DEFAULT_SCOPE, "host", "1")
LONG = 30.0


class Told:
    """Stands in for the SDK's session, and counts what it is told."""

    def __init__(self) -> None:
        self.times = 0

    async def send_tool_list_changed(self) -> None:
        self.times += 1


class Scene:
    def __init__(self) -> None:
        self.open = {SESSION}
        self.notices = Notices(MemoryStore(), alive=lambda _: True, listens=self.open.__contains__)

    def connect(self, session_id: str = SESSION, owner: str = "ann", scope: Scope = DEFAULT_SCOPE) -> Told:
        told: Any = Told()
        self.notices.add_session(session_id, owner, scope, told)
        return told


@asynccontextmanager
async def scene() -> AsyncGenerator[Scene]:
    made = Scene()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(made.notices.run)
            await anyio.wait_all_tasks_blocked()
            yield made
            group.cancel_scope.cancel()


@asynccontextmanager
async def waiting(notices: Notices, client: ClientKey) -> AsyncGenerator[anyio.Event]:
    """Wait for a fetch while the context is open; the event fires when it came."""
    done = anyio.Event()

    async def wait() -> None:
        await notices.until_fetched(client, LONG)
        done.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        yield done
        await done.wait()


@pytest.mark.parametrize("client", [SESSION, MODERN])
async def test_the_answer_waits_until_the_own_client_has_the_list(client: ClientKey) -> None:
    async with scene() as here:
        here.connect()
        with here.notices.listening(MODERN, "ann", DEFAULT_SCOPE):
            too_old = here.notices.fetching(client)
            await here.notices.announce("ann", DEFAULT_SCOPE)
            async with waiting(here.notices, client) as done:
                too_old()
                await anyio.wait_all_tasks_blocked()
                assert not done.is_set()
                here.notices.fetching(client)()
            await here.notices.until_fetched(client, LONG)  # it has been fetched


async def test_nobody_waits_for_who_does_not_listen() -> None:
    async with scene() as here:
        here.connect()
        here.connect("other")
        await here.notices.announce("ann", DEFAULT_SCOPE)
        here.open.clear()
        for client in (SESSION, "other", "unknown", MODERN):
            assert not here.notices.hears(client)
            await here.notices.until_fetched(client, LONG)


async def test_a_listener_that_leaves_is_not_waited_for() -> None:
    async with scene() as here:
        with ExitStack() as stream:
            stream.enter_context(here.notices.listening(MODERN, "ann", DEFAULT_SCOPE))
            await here.notices.announce("ann", DEFAULT_SCOPE)
            async with waiting(here.notices, MODERN) as done:
                assert not done.is_set()
                stream.close()


async def test_who_fetches_nothing_is_waited_for_no_longer_than_the_bound() -> None:
    async with scene() as here:
        here.connect()
        await here.notices.announce("ann", DEFAULT_SCOPE)
        await here.notices.until_fetched(SESSION, 0.01)
        async with waiting(here.notices, SESSION) as done:
            assert not done.is_set()
            here.notices.fetching(SESSION)()


async def test_each_change_is_told_once_to_whom_it_concerns() -> None:
    async with scene() as here:
        own, every = here.connect(), here.connect("every", scope=EVERY_SCOPE)
        others = here.connect("other scope", scope=Scope("s")), here.connect("bob's", owner="bob")
        for _ in range(3):
            await here.notices.announce("ann", DEFAULT_SCOPE)
        await here.notices.announce("ann", EVERY_SCOPE)
        await anyio.wait_all_tasks_blocked()
        assert (own.times, every.times, [other.times for other in others]) == (3, 4, [0, 0])


async def test_anothers_change_holds_nobody_up() -> None:
    async with scene() as here:
        here.connect()
        await here.notices.announce("bob", DEFAULT_SCOPE)
        await here.notices.until_fetched(SESSION, LONG)


class Stream:
    """Stands in for the context of a `subscriptions/listen`."""

    request_id = 1

    def __init__(self) -> None:
        self.said: list[str] = []
        self.session = self

    async def send_notification(self, notification: Any, related_request_id: int) -> None:
        self.said.append(notification.method)


async def test_any_number_of_streams_hears_of_a_change() -> None:
    params = SubscriptionsListenRequestParams(notifications=SubscriptionFilter(tools_list_changed=True))
    streams: list[Any] = [Stream() for _ in range(1500)]  # the SDK alone takes 1024
    async with scene() as here, anyio.create_task_group() as group:

        async def listen(stream: Any) -> None:
            await here.notices.listener("ann", DEFAULT_SCOPE)(stream, params)

        for stream in streams:
            group.start_soon(listen, stream)
        await anyio.wait_all_tasks_blocked()
        await here.notices.announce("ann", DEFAULT_SCOPE)
        await anyio.wait_all_tasks_blocked()
        here.notices.close()
    heard = ["notifications/subscriptions/acknowledged", "notifications/tools/list_changed"]
    assert all(stream.said == heard for stream in streams)
