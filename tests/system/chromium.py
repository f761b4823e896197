"""A real Chromium without a window, driven by its own protocol (CDP): tabs that visit addresses and run scripts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect

__all__ = ["Browser", "Tab", "open_browser", "path_to_chromium"]

_SECONDS: Final = 60.0
_OPTIONS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--remote-debugging-port=0",
)


def path_to_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One browser with one profile, so that its tabs share cookies and service workers."""

    def __init__(self, wire: ClientConnection) -> None:
        self._wire = wire
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def read(self) -> None:
        """Take what the browser says, until it ends."""
        async for text in self._wire:
            said = json.loads(text)
            waiting = self._waiting.pop(said.get("id", 0), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(said)

    async def ask(self, method: str, tab: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        named = {} if tab is None else {"sessionId": tab}
        await self._wire.send(json.dumps({"id": number, "method": method, "params": params, **named}))
        async with asyncio.timeout(_SECONDS):
            said = await answer
        assert "error" not in said, (method, said)
        return said["result"]

    async def tab(self, url: str = "about:blank") -> Tab:
        target = await self.ask("Target.createTarget", url="about:blank")
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = Tab(self, attached["sessionId"])
        if url != "about:blank":
            await tab.visit(url)
        return tab


class Tab:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def visit(self, url: str) -> None:
        """Open an address as a person does who types it, and wait until the page is there."""
        said = await self._browser.ask("Page.navigate", self._session, url=url)
        assert "errorText" not in said or said["errorText"] == "net::ERR_ABORTED", said
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        """Return the value of an expression, which may be a promise.

        Raises:
            AssertionError: It threw.
        """
        said = await self._browser.ask(
            "Runtime.evaluate",
            self._session,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true; a page that is replaced meanwhile is asked again."""
        async with asyncio.timeout(_SECONDS):
            while True:
                with contextlib.suppress(AssertionError):
                    if await self.run(f"Boolean({condition})"):
                        return
                await asyncio.sleep(0.05)


@asynccontextmanager
async def open_browser(program: str) -> AsyncGenerator[Browser]:
    profile = Path(tempfile.mkdtemp(prefix="ash-chromium-"))
    null = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank", stdin=null, stdout=null, stderr=null
    )
    try:
        place = profile / "DevToolsActivePort"
        async with asyncio.timeout(_SECONDS):
            while not place.exists() or len(place.read_text().split("\n")) < 2:
                assert process.returncode is None, "Chromium ended at its start"
                await asyncio.sleep(0.05)
        port, path = place.read_text().split("\n")[:2]
        async with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as wire:
            browser = Browser(wire)
            reading = asyncio.create_task(browser.read())
            try:
                yield browser
            finally:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        shutil.rmtree(profile, ignore_errors=True)
