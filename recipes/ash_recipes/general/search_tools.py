"""Web search by the ddgs library: pages, images, videos and news."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio
import anyio.to_thread
from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from pydantic import BaseModel, Field

from ash_recipes.general.answers import answer, tool
from ash_recipes.general.network import proxy, refused_by_policy, require_network
from ash_recipes.runner.problems import Problem

__all__ = ["add"]

TIMEOUT_SECONDS = 45.0
ENGINE = "http://duckduckgo.com/"
"""One of those that are asked; a search that found nothing says if the network policy refuses it."""
FIELD_CHARACTERS = 2000
"""Of each part of a result; 50 of them stay far within what clients take."""

Kind = Literal["text", "images", "videos", "news"]
Query = Annotated[str, Field(min_length=1, max_length=500, description="What to search for")]
Count = Annotated[int, Field(ge=1, le=50, description="The most results")]
Region = Annotated[str, Field(description="Country and language, such as us-en or de-de")]
SafeSearch = Annotated[Literal["on", "moderate", "off"], Field(description="How much is filtered")]
TimeLimit = Annotated[
    Literal["d", "w", "m", "y"] | None, Field(description="Only of the last day, week, month or year")
]
Page = Annotated[int, Field(ge=1, le=100, description="Which page of results")]
Backend = Annotated[str, Field(description="auto, or one of ddgs's engines, such as duckduckgo or brave")]


class SearchResults(BaseModel):
    query: str
    results: Annotated[list[dict[str, Any]], Field(description="Each with a title, an address and more")]


def add(server: FastMCP[Any]) -> None:
    """Add the four tools."""
    offered: tuple[tuple[str, str, Kind, str], ...] = (
        ("ddgs_search_mcp_search", "Search the web", "text", "pages (title, href, body)"),
        ("ddgs_search_mcp_search_images", "Search images", "images", "images (title, image, url, source)"),
        ("ddgs_search_mcp_search_videos", "Search videos", "videos", "videos (title, content, duration, publisher)"),
        ("ddgs_search_mcp_search_news", "Search news", "news", "news (date, title, url, source, body)"),
    )
    for name, title, kind, what in offered:
        _add_one(server, name, title, kind, what)


def _add_one(server: FastMCP[Any], name: str, title: str, kind: Kind, what: str) -> None:
    async def search(
        query: Query,
        max_results: Count = 10,
        region: Region = "us-en",
        safesearch: SafeSearch = "moderate",
        timelimit: TimeLimit = None,
        page: Page = 1,
        backend: Backend = "auto",
    ) -> ToolResult:
        require_network()
        asked = {
            "query": query,
            "max_results": max_results,
            "region": region,
            "safesearch": safesearch,
            "timelimit": timelimit,
            "page": page,
            "backend": backend,
        }
        shape = SearchResults(query=query, results=await _search(kind, asked))
        return answer(_describe(shape), shape)

    search.__doc__ = f"Search the web for {what} and return the best results first. Needs a sandbox with network."
    tool(server, name, title=title, output=SearchResults)(search)


async def _search(kind: Kind, asked: dict[str, Any]) -> list[dict[str, Any]]:
    import ddgs
    from ddgs.exceptions import DDGSException

    def search() -> list[dict[str, Any]]:
        engine: Any = ddgs.DDGS(proxy=proxy(), timeout=15)  # pyright: ignore[reportUnknownMemberType]
        return getattr(engine, kind)(**asked)

    try:
        with anyio.fail_after(TIMEOUT_SECONDS):
            found = await anyio.to_thread.run_sync(search, abandon_on_cancel=True)
    except TimeoutError as exc:
        raise Problem("search_failed", "the search engines did not answer in time; try again") from exc
    except DDGSException as exc:
        if refusal := await refused_by_policy(ENGINE):  # the library calls that a search without results, too
            raise Problem("search_failed", f"nothing was found, and {ENGINE} was not let out: {refusal}") from exc
        if "no results" in str(exc).lower():
            return []
        raise Problem("search_failed", f"the search failed: {exc}") from exc
    return [{key: _short(value) for key, value in result.items()} for result in found]


def _short(value: Any) -> Any:
    return value[:FIELD_CHARACTERS] if isinstance(value, str) else value


def _describe(shape: SearchResults) -> str:
    if not shape.results:
        return f"No results for {shape.query!r}."
    told: list[str] = []
    for number, result in enumerate(shape.results, 1):
        lines = [f"{key}: {value}" for key, value in result.items() if value]
        told.append(f"{number}. " + "\n   ".join(lines))
    return "\n\n".join(told)
