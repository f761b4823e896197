"""How the web tools of `general` learn that a network policy, and not the web, refused them."""

from __future__ import annotations

import re

import pytest
from ddgs.exceptions import DDGSException

from ash_recipes.general import search_tools
from ash_recipes.general.network import refused_by_policy
from ash_recipes.runner.forwarder import forwarding
from ash_recipes.runner.problems import Problem
from tests.hub.egress.egress_parts import proxying, web_server

pytestmark = pytest.mark.anyio

NO_NETWORK = "Forbidden (egress refused: no_network; policy: none)"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every search end as those do of which no request came through."""

    class Engine:
        def __init__(self, **_: object) -> None:
            pass

        def text(self, **_: object) -> None:
            raise DDGSException("No results found.")

    monkeypatch.setattr("ddgs.DDGS", Engine)


async def search() -> object:
    return await search_tools._search("text", {})  # pyright: ignore[reportPrivateUsage]


async def test_a_search_that_the_policy_refused_is_no_search_without_results(monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxying("none") as it, forwarding(it.path, port=0) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert await refused_by_policy("http://a.test/") == NO_NETWORK
        with pytest.raises(Problem, match=f"was not let out: {re.escape(NO_NETWORK)}"):
            await search()


async def test_what_is_let_out_or_answered_by_nobody_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with web_server() as (port, _):
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert await search() == []
    assert await search() == []
