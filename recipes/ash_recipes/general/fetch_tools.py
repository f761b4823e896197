"""The tool that fetches web pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import anyio.to_thread
from fastmcp import FastMCP
from fastmcp.tools.base import ToolResult
from pydantic import BaseModel, Field

from ash_recipes.general.answers import answer, fitting, tool
from ash_recipes.general.network import require_network
from ash_recipes.runner.problems import Problem

if TYPE_CHECKING:
    import httpx

__all__ = ["add"]

USER_AGENT = "ash-fetch/1.0 (autonomous; on behalf of a user)"
TIMEOUT_SECONDS = 30.0
PAGE_BYTES = 8 * 1024 * 1024
ROBOTS_BYTES = 512 * 1024
MAX_REDIRECTS = 8
ANSWER_BYTES = 400_000


class FetchedPage(BaseModel):
    url: Annotated[str, Field(description="The address after redirects")]
    content_type: str
    content: str
    start_index: int
    total_length: Annotated[int, Field(description="Characters of the whole page, as text")]
    next_index: Annotated[int | None, Field(description="Where to read on; null at the end")]


@dataclass(frozen=True, slots=True)
class _Page:
    url: str
    content_type: str
    text: str

    @property
    def is_html(self) -> bool:
        return "text/html" in self.content_type or "<html" in self.text[:200].lower()


def add(server: FastMCP[Any]) -> None:
    """Add the tool."""

    @tool(server, "fetch_fetch", title="Fetch a web page", output=FetchedPage)
    async def fetch(
        url: Annotated[str, Field(min_length=1, max_length=8000, description="http or https")],
        max_length: Annotated[int, Field(ge=1, le=999_999, description="The most characters to return")] = 5000,
        start_index: Annotated[int, Field(ge=0, description="Where to begin, to read on in a long page")] = 0,
        raw: Annotated[bool, Field(description="Return the page as it is, not as Markdown")] = False,
    ) -> ToolResult:
        """Fetch a page from the web and return it as Markdown, a piece at a time.

        Needs a sandbox with network. Pages whose robots.txt forbids it are not fetched.
        """
        _check_address(url)
        require_network()
        page = await _fetch(url)
        text, note = page.text, ""
        if page.is_html and not raw:
            text = await anyio.to_thread.run_sync(_markdown, page.text)
        elif not raw:
            note = f"Content type {page.content_type} cannot be simplified to markdown, but here is the raw content:\n"
        piece = fitting(text[start_index : start_index + max_length], ANSWER_BYTES)
        end = start_index + len(piece)
        shape = FetchedPage(
            url=page.url,
            content_type=page.content_type,
            content=piece,
            start_index=start_index,
            total_length=len(text),
            next_index=end if end < len(text) else None,
        )
        return answer(f"{note}Contents of {page.url}:\n{_describe(shape)}", shape)


def _describe(page: FetchedPage) -> str:
    if page.start_index >= page.total_length:
        return "<error>No more content available.</error>"
    if page.next_index is None:
        return page.content
    return f"{page.content}\n\n<error>More follows; fetch again with start_index={page.next_index}.</error>"


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise Problem("bad_request", f"{url[:200]!r} is no address of a web page; it begins with http:// or https://")


async def _fetch(url: str) -> _Page:
    import httpx

    try:
        async with httpx.AsyncClient(headers={"user-agent": USER_AGENT}, timeout=TIMEOUT_SECONDS) as client:
            with anyio.fail_after(2 * TIMEOUT_SECONDS):
                return await _follow(client, url)
    except TimeoutError as exc:
        raise Problem("fetch_failed", f"{url} did not answer in time") from exc
    except httpx.HTTPError as exc:
        raise Problem("fetch_failed", f"{url} could not be fetched: {type(exc).__name__}: {exc}") from exc
    except (ValueError, httpx.InvalidURL, ImportError) as exc:
        raise Problem("fetch_failed", f"{url} could not be fetched: {exc}") from exc


async def _follow(client: httpx.AsyncClient, url: str) -> _Page:
    for _ in range(MAX_REDIRECTS):
        await _respect_robots(client, url)
        async with client.stream("GET", url) as response:
            _check_let_out(response)
            if response.next_request is None:
                if response.status_code >= 400:
                    raise Problem("fetch_failed", f"{url} answered with status {response.status_code}")
                body = await _read(response, PAGE_BYTES)
                text = body.decode(response.charset_encoding or "utf-8", "replace")
                return _Page(str(response.url), response.headers.get("content-type", ""), text)
            url = str(response.next_request.url)
            _check_address(url)
    raise Problem("fetch_failed", f"{url}: too many redirects")


def _check_let_out(response: httpx.Response) -> None:
    """Tell the hive's egress proxy, which answers for a server that the sandbox may not reach, from the server."""
    if "ash-egress" in response.headers:
        raise Problem("fetch_failed", f"{response.url} was not let out: {response.reason_phrase}")


async def _read(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > limit:
            raise Problem("fetch_failed", f"{response.url} is larger than {limit} bytes; fetch it by a command")
    return bytes(body)


async def _respect_robots(client: httpx.AsyncClient, url: str) -> None:
    from urllib.robotparser import RobotFileParser

    parts = urlsplit(url)
    address = urlunsplit((parts.scheme, parts.netloc, "/robots.txt", "", ""))
    response = await client.get(address, follow_redirects=True)
    _check_let_out(response)
    if response.status_code in (401, 403):
        raise Problem("fetch_failed", f"{address} answered {response.status_code}: fetching by programs is not wanted")
    if response.status_code >= 400:
        return
    parser = RobotFileParser()
    parser.parse(response.text[:ROBOTS_BYTES].splitlines())
    if not parser.can_fetch(USER_AGENT, url):
        raise Problem("fetch_failed", f"{address} forbids programs to fetch {url}")


def _markdown(html: str) -> str:
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    page = BeautifulSoup(html, "html.parser")
    for part in page(["script", "style", "noscript", "template", "nav", "footer", "svg", "iframe"]):
        part.decompose()
    root = page.find("main") or page.find("article") or page.body or page
    try:
        text = MarkdownConverter(heading_style="ATX").convert_soup(root).strip()
    except RecursionError:
        text = root.get_text("\n", strip=True)
    return text or "<error>The page holds no text.</error>"
