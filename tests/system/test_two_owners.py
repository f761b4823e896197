"""Two owners of one hive: whatever one tries on the other's sandboxes, it is answered as if they did not exist."""

from __future__ import annotations

import json
import logging
import random
import re
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import anyio
import pytest

from ash_mcp.types import new_sandbox_id
from tests.system.owners import LEGACY, MODERN, Answer, Owner, Two, open_two

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]

ERAS = [MODERN, LEGACY]
ABSENT = "nonesuch"
"""As long as the names of those that exist."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def two(anyio_backend: str) -> AsyncGenerator[Two]:
    async with open_two() as two:
        yield two


@pytest.fixture(params=["key against token", "token against key"])
def intruder(two: Two, request: pytest.FixtureRequest) -> Owner:
    return two.ann if request.param == "key against token" else two.bob


def others_names(two: Two, intruder: Owner) -> dict[str, str]:
    """Return each name of the other's sandboxes with one of the same form that nobody has."""
    owner, session = ("ann", "anns") if intruder is two.bob else (None, "bobs")
    names = {f"{session}prey": ABSENT, f"{session}dead": ABSENT}
    for sandbox in two.hive.sandboxes.registry.all():
        if (sandbox.owner == owner) if owner else sandbox.owner.endswith("#bob"):
            names[sandbox.id] = new_sandbox_id()
    assert len(names) == 4
    return names


def own_name(two: Two, intruder: Owner) -> str:
    return "annsprey" if intruder is two.ann else "bobsprey"


TOOL_CALLS: dict[str, Callable[[str, str], tuple[str, Mapping[str, Any]]]] = {
    "destroy": lambda name, own: ("destroy", {"session": name}),
    "destroy several": lambda name, own: ("destroy", {"session": [name, name]}),
    "extend": lambda name, own: ("extend", {"session": name, "ttl_seconds": 60}),
    "network": lambda name, own: ("network", {"session": name, "policy": "none"}),
    "call": lambda name, own: ("call", {"session": name, "tool": "echo", "arguments": {"text": "x"}}),
    "call exec": lambda name, own: ("call", {"session": name, "tool": "ash_exec", "arguments": {"command": "id"}}),
    "call, no such tool": lambda name, own: ("call", {"session": name, "tool": "nope"}),
    "call, odd arguments": lambda name, own: ("call", {"session": name, "tool": "echo", "arguments": {}, "more": 1}),
    "read_resource": lambda name, own: ("read_resource", {"session": name, "uri": f"sandbox://{name}/x"}),
    "read_resource, own": lambda name, own: ("read_resource", {"session": own, "uri": f"sandbox://{name}/x"}),
    "read_resource, link": lambda name, own: ("read_resource", {"session": name, "uri": "file:///etc/passwd"}),
    "ash_tools": lambda name, own: ("ash_tools", {"session": name}),
    "ash_logs": lambda name, own: ("ash_logs", {"session": name}),
    "namespaced": lambda name, own: (f"{name}_echo", {"text": "x"}),
    "namespaced exec": lambda name, own: (f"{name}_ash_exec", {"command": "id"}),
    "namespaced, no such tool": lambda name, own: (f"{name}_nope", {}),
}


async def assert_alike(
    two: Two, intruder: Owner, ask: Callable[[str], Any], *, refused: Callable[[Answer], bool] | None = None
) -> None:
    """Ask of each of the other's sandboxes, and of one that does not exist, and compare all that came back."""
    for name, absent in others_names(two, intruder).items():
        theirs: Answer = await ask(name)
        nobodys: Answer = await ask(absent)
        assert theirs.without(name) == nobodys.without(absent), name
        if refused is not None:
            assert refused(theirs), theirs
    living = [s.session for s in two.hive.sandboxes.registry.living()]
    assert sorted(living) == ["annsprey", "bobsprey"]


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("attempt", TOOL_CALLS)
async def test_no_tool_tells_anothers_sandbox_from_none(two: Two, intruder: Owner, attempt: str, era: str) -> None:
    async def ask(name: str) -> Answer:
        tool, arguments = TOOL_CALLS[attempt](name, own_name(two, intruder))
        return await intruder.call(tool, arguments, era)

    def refused(answer: Answer) -> bool:
        return answer.result.get("isError", False) or answer.result["structuredContent"]["not_found"] != []

    await assert_alike(two, intruder, ask, refused=refused)


@pytest.mark.parametrize("era", ERAS)
async def test_no_resource_does(two: Two, intruder: Owner, era: str) -> None:
    for uri in ("sandbox://{}/x", "sandbox://{}//etc/passwd", "file:///{}"):
        await assert_alike(
            two,
            intruder,
            lambda name, uri=uri: intruder.ask(era, "resources/read", {"uri": uri.format(name)}),
            refused=lambda answer: "error" in answer.body,
        )


ROUTES = [
    ("GET", "/s/{}/mcp"),
    ("POST", "/s/{}/mcp"),
    ("PUT", "/s/{}/mcp"),
    ("DELETE", "/s/{}/mcp"),
    ("GET", "/s/{}/_ash/health"),
    ("GET", "/mcp/in/{}"),
    ("POST", "/mcp/in/{}"),
    ("GET", "/mcp?scope={}"),
    ("GET", "/sandboxes/{}"),
    ("DELETE", "/sandboxes/{}"),
    ("GET", "/{}"),
    ("GET", "/_ash/{}"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_no_route_does(two: Two, intruder: Owner, method: str, path: str) -> None:
    await assert_alike(two, intruder, lambda name: intruder.http(method, path.format(name)))


@pytest.mark.parametrize("header", ["x-session-id", "ash-scope", "mcp-name"])
async def test_no_header_does(two: Two, intruder: Owner, header: str) -> None:
    async def ask(name: str) -> Answer:
        return await intruder.http("POST", "/mcp", headers={header: name}, body={})

    await assert_alike(two, intruder, ask)


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
@pytest.mark.parametrize("era", ERAS)
async def test_anothers_transport_session_is_as_good_as_none(two: Two, intruder: Owner, method: str, era: str) -> None:
    victim = two.bob if intruder is two.ann else two.ann
    message: Any = {"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": {}} if method == "POST" else None

    async def ask(session: str) -> Answer:
        headers = {"mcp-session-id": session, "mcp-protocol-version": era}
        return await intruder.http(method, "/mcp", headers=headers, body=message)

    theirs, nobodys = await ask(victim.session), await ask("0" * len(victim.session))
    assert theirs.without(victim.session) == nobodys.without("0" * len(victim.session))
    assert theirs.status >= 400
    assert (await victim.ask(LEGACY, "tools/list", {})).status == 200


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("query", ["", "?scope=*", "?expand=all"])
async def test_lists_hold_nothing_of_anothers(two: Two, intruder: Owner, query: str, era: str) -> None:
    shown = [
        await intruder.ask(era, "tools/list", {}, f"/mcp{query}"),
        await intruder.ask(era, "resources/list", {}, f"/mcp{query}"),
        await intruder.call("list", {"include_ended": True}, era, f"/mcp{query}"),
    ]
    for answer in shown:
        assert answer.status == 200
        for name in others_names(two, intruder):
            assert name not in answer.body
    assert own_name(two, intruder) in shown[0].body and own_name(two, intruder) in shown[2].body


async def test_names_and_idempotency_keys_are_each_owners_own(two: Two, intruder: Owner) -> None:
    taken = next(iter(others_names(two, intruder)))
    made = await intruder.call("spawn", {"recipe": "echo", "session": taken, "idempotency_key": taken})
    info = made.result["structuredContent"]
    assert info["session"] == taken and info["sandbox_id"] not in others_names(two, intruder)
    ended = (await intruder.call("destroy", {"session": "*", "labels": {}})).result
    assert ended["isError"]  # it takes no labels, and so ends nothing
    ended = (await intruder.call("destroy", {"session": taken})).result["structuredContent"]
    assert [sandbox["sandbox_id"] for sandbox in ended["destroyed"]] == [info["sandbox_id"]]
    two.hive.sandboxes.registry.remove(two.hive.sandboxes.registry.by_id(info["sandbox_id"]))  # type: ignore[arg-type]


async def test_metrics_are_no_ones_business(two: Two, intruder: Owner) -> None:
    assert (await intruder.http("GET", "/metrics")).status == 403


@pytest.mark.parametrize("era", ERAS)
async def test_news_of_one_do_not_reach_the_other(two: Two, intruder: Owner, era: str) -> None:
    victim = two.bob if intruder is two.ann else two.ann
    heard: dict[str, list[str]] = {"victim": [], "intruder": []}
    open_streams = anyio.Event()
    news = anyio.Event()

    async def listen(who: str, owner: Owner) -> None:
        async with owner.listening(era) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            if era == MODERN:
                await anext(lines)  # it says first what it will tell
            streams.append(who)
            if len(streams) == 2:
                open_streams.set()
            async for line in lines:
                if line.startswith("data: {") and "list_changed" in (said := json.loads(line[6:])).get("method", ""):
                    heard[who].append(said["method"])
                    if who == "victim" and len(heard[who]) == 2:
                        news.set()

    streams: list[str] = []
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(listen, "victim", victim)
            group.start_soon(listen, "intruder", intruder)
            await open_streams.wait()
            await victim.call("spawn", {"recipe": "echo", "session": "fresh"})
            await victim.call("destroy", {"session": "fresh"})
            await news.wait()
            # what comes next on the other's stream is its own news, so nothing was before it
            await intruder.call("spawn", {"recipe": "echo", "session": "own"})
            while not heard["intruder"]:
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert heard["intruder"] == ["notifications/tools/list_changed"]
    await intruder.call("destroy", {"session": "own"})


async def test_whoever_has_no_credential_is_told_how_to_get_one(two: Two) -> None:
    bare = Owner(two.hive, "nonsense", two.ann.client)
    refused = await bare.call("list", {})
    assert refused.status == 401
    challenged = dict(refused.headers)["www-authenticate"]
    assert challenged.endswith('error="invalid_token"')
    found = re.search(r'resource_metadata="([^"]+)"', challenged)
    assert found is not None
    described = (await two.ann.client.get(found[1])).json()
    assert described["resource"] == two.hive.url
    assert described["authorization_servers"] == [two.hive.settings.auth.oidc.issuer]  # type: ignore[union-attr]


@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", ["extend", "call"])
async def test_time_does_not_tell_anothers_sandbox_from_none(two: Two, tool: str) -> None:
    """10,000 interleaved samples: medians within 2 %, and a rank test that sees no difference."""
    logging.getLogger("ash").setLevel(logging.ERROR)
    (foreign,) = [s.id for s in two.hive.sandboxes.registry.living() if s.owner == "ann"]
    arguments = {"extend": {"ttl_seconds": 60}, "call": {"tool": "echo"}}[tool]
    took: dict[bool, list[float]] = {True: [], False: []}
    order = [True, False] * 5_100
    random.Random(7).shuffle(order)  # strict turns would measure whatever else comes every second time
    for number, exists in enumerate(order):
        name = "".join(foreign) if exists else new_sandbox_id()  # a new string both times
        started = time.perf_counter()
        await two.bob.call(tool, {"session": name, **arguments})
        if number >= 200:
            took[exists].append(time.perf_counter() - started)
    there, absent = statistics.median(took[True]), statistics.median(took[False])
    assert abs(there - absent) / absent < 0.02
    assert abs(rank_z(took[True], took[False])) < 3.3  # one run in a thousand by chance


def rank_z(first: list[float], second: list[float]) -> float:
    """Return how many standard deviations the rank sum of `first` is from that of equals (Mann-Whitney)."""
    ranked = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    rank_sum = sum(rank for rank, (_, which) in enumerate(ranked, 1) if which == 0)
    n, m = len(first), len(second)
    u = rank_sum - n * (n + 1) / 2
    return (u - n * m / 2) / (n * m * (n + m + 1) / 12) ** 0.5
