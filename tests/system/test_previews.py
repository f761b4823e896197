"""Servers inside sandboxes in a real Chromium: a preview that works, and a hostile page that reaches nothing else.

The hive is one of loopback without keys, which whoever runs the browser may use: so nothing but what is tested here
keeps a page out of it.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httpx
import pytest

from ash_hub.app import open_hive
from ash_hub.settings import HubSettings
from ash_mcp import Hive, Sandbox, errors
from tests.system.chromium import Browser, open_browser, path_to_chromium

pytestmark = [pytest.mark.anyio, pytest.mark.browser]

PORT: Final = 8000
SERVER: Final = Path(__file__).with_name("preview_server.py").read_bytes()
PAGE: Final = b"""<!doctype html><title>%s</title><h1 id="words">%s</h1><script>
  new WebSocket(`ws://${location.host}/changes`).onmessage = () => location.reload();
</script>"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass(frozen=True)
class Site:
    """A sandbox that serves, and the URL that opens its preview."""

    box: Sandbox
    http: httpx.AsyncClient
    url: str

    @property
    def origin(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    async def log(self) -> list[str]:
        """Return what its server was asked for."""
        return (await self.http.get(self.box.port_url(PORT) + "log")).json()

    async def asked(self, word: str) -> list[str]:
        return [line for line in await self.log() if word in line]


async def open_site(hive: Hive, http: httpx.AsyncClient, words: bytes) -> Site:
    box = await hive.spawn("general", ports=[PORT])
    await box.files.write("server.py", SERVER)
    await box.files.write("index.html", PAGE % (words, words))
    await box.background(f"python3 server.py {PORT}")
    with anyio.fail_after(20):
        while (await http.get(box.port_url(PORT) + "log")).status_code != 200:
            await anyio.sleep(0.05)
    return Site(box, http, await box.url(PORT))


@pytest.fixture(scope="module", params=["localhost", "previews.localhost"])
async def hive_url(request: pytest.FixtureRequest) -> AsyncGenerator[str]:
    """The URL of a hive whose previews are below a domain; below the second, all are one site to a browser."""
    with (
        tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as name,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        port, folder = free.getsockname()[1], Path(name)
        free.close()
        domain = f"http://*.{request.param}:{port}" if request.param != "localhost" else None
        settings = HubSettings(port=port, state_dir=folder / "state", run_dir=folder / "run", preview_url=domain)
        async with open_hive(settings) as served:
            yield served.url


@pytest.fixture(scope="module")
async def http() -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
async def hive(hive_url: str) -> AsyncGenerator[Hive]:
    async with Hive(hive_url) as hive:
        yield hive


@pytest.fixture(scope="module")
async def browser() -> AsyncGenerator[Browser]:
    program = path_to_chromium()
    if program is None:
        pytest.skip("there is no Chromium here; .ci/chromium installs Debian's")
    async with open_browser(program) as browser:
        yield browser


@pytest.fixture(scope="module")
async def victim(hive: Hive, http: httpx.AsyncClient) -> AsyncGenerator[Site]:
    site = await open_site(hive, http, b"victim")
    yield site
    await site.box.destroy()


@pytest.fixture(scope="module")
async def hostile(hive: Hive, http: httpx.AsyncClient) -> AsyncGenerator[Site]:
    site = await open_site(hive, http, b"hostile")
    yield site
    await site.box.destroy()


async def test_a_preview_shows_what_a_sandbox_serves_and_hears_its_websocket(browser: Browser, victim: Site):
    tab = await browser.tab(victim.url)
    assert await tab.run("document.getElementById('words').textContent") == "victim"
    assert await tab.run("location.href") == victim.origin + "/", "the secret is not in the address any more"
    assert await tab.run("document.cookie") == "inside=1", "the page sees its own cookies alone"
    assert await tab.run("fetch('/mcp').then(r => r.text())") == "seen", "every path is the server's"
    (line,) = await victim.asked("/mcp")
    assert "ash-preview" not in line and "ashs_" not in line and '["cookie", "inside=1"]' in line
    with anyio.fail_after(20):
        while not await victim.asked("WEBSOCKET /changes"):
            await anyio.sleep(0.05)
    await victim.box.files.write("index.html", PAGE % (b"victim", b"changed"))
    await tab.until("document.getElementById('words').textContent === 'changed'")


ATTACK: Final = """(async () => {
  const hive = %(hive)s, hives = %(hives)s, victim = %(victim)s, box = %(box)s, port = %(port)s;
  const came = {};
  const within = (ms, promise) => Promise.race([promise, new Promise((_, no) => setTimeout(() => no("late"), ms))]);
  const attempt = async (name, work) => {
    try { came[name] = await within(8000, work()); } catch (error) { came[name] = "kept out: " + error; }
  };
  const body = JSON.stringify({jsonrpc: "2.0", id: 1, method: "tools/call", params: {name: "spawn", arguments: {}}});
  const text = (body) => new Blob([body], {type: "text/plain"});
  const seen = (answer) => answer.type === "opaque" ? "opaque" : answer.text();
  const socket = (url) => new Promise((yes, no) => {
    const made = new WebSocket(url);
    made.onopen = () => yes("open");
    made.onerror = () => no("refused");
  });
  const element = (kind, where, url) => new Promise((yes, no) => {
    const made = document.createElement(kind);
    made.onload = () => yes("loaded");
    made.onerror = () => no("refused");
    made[where] = url;
    if (kind === "link") made.rel = "stylesheet";
    document.body.append(made);
  });
  const framed = (url) => new Promise((yes) => {
    const made = document.createElement("iframe");
    made.onload = () => { try { yes(made.contentDocument.body.innerText); } catch (e) { yes("closed"); } };
    made.src = url;
    document.body.append(made);
  });
  const form = (url, kind) => new Promise((yes) => {
    const frame = document.createElement("iframe");
    frame.name = "f" + Math.random();
    const made = document.createElement("form");
    made.method = "POST"; made.action = url; made.enctype = kind; made.target = frame.name;
    const field = document.createElement("input");
    field.name = body; field.value = "";
    made.append(field);
    document.body.append(frame, made);  // which loads an empty page at once
    frame.onload = () => { try { yes(frame.contentDocument.body.innerText); } catch (e) { yes("closed"); } };
    made.submit();
  });
  for (const base of hives) {
    const ws = base.replace("http", "ws");
    await attempt(`${base} read`, () => fetch(base + "/mcp").then(seen));
    await attempt(`${base} json`, () => fetch(base + "/mcp", {
      method: "POST", body, credentials: "include", headers: {"content-type": "application/json"}}).then(seen));
    await attempt(`${base} blind`, () => fetch(base + "/mcp", {
      method: "POST", mode: "no-cors", credentials: "include", body: text(body)}).then(seen));
    await attempt(`${base} blind json`, () => fetch(base + "/mcp", {
      method: "POST", mode: "no-cors", body: new Blob([body], {type: "application/json"})}).then(seen));
    await attempt(`${base} rest`, () => fetch(base + "/spawn", {
      method: "POST", mode: "no-cors", body: text("{}")}).then(seen));
    await attempt(`${base} delete`, () => fetch(base + "/deprovision-all", {method: "DELETE"}).then(seen));
    await attempt(`${base} beacon`, async () => { navigator.sendBeacon(base + "/mcp", body); return "sent"; });
    await attempt(`${base} socket`, () => socket(ws + "/mcp"));
    await attempt(`${base} terminal`, () => socket(`${ws}/s/${box}/terminal`));
    await attempt(`${base} port socket`, () => socket(`${ws}/s/${box}/ports/${port}/hit-hive-ws`));
    await attempt(`${base} port read`, () => fetch(`${base}/s/${box}/ports/${port}/hit-hive-fetch`).then(seen));
    await attempt(`${base} port blind`, () => fetch(`${base}/s/${box}/ports/${port}/hit-hive-blind`, {
      mode: "no-cors", credentials: "include"}).then(seen));
    await attempt(`${base} port post`, () => fetch(`${base}/s/${box}/ports/${port}/hit-hive-post`, {
      mode: "no-cors", method: "POST", body}).then(seen));
    await attempt(`${base} image`, () => element("img", "src", `${base}/s/${box}/ports/${port}/hit-hive-img`));
    await attempt(`${base} script`, () => element("script", "src", `${base}/s/${box}/ports/${port}/hit-hive-js`));
    await attempt(`${base} style`, () => element("link", "href", `${base}/s/${box}/ports/${port}/hit-hive-css`));
    await attempt(`${base} file`, () => element("script", "src", `${base}/s/${box}/files/server.py`));
    await attempt(`${base} frame`, () => framed(base + "/"));
    await attempt(`${base} frame of a port`, () => framed(`${base}/s/${box}/ports/${port}/hit-hive-frame`));
    await attempt(`${base} form`, () => form(base + "/mcp", "text/plain"));
    await attempt(`${base} form rest`, () => form(base + "/spawn", "text/plain"));
    await attempt(`${base} form of a port`, () => form(`${base}/s/${box}/ports/${port}/hit-hive-form`, "text/plain"));
    await attempt(`${base} worker`, () => navigator.serviceWorker.register(base + "/s/" + box + "/files/sw.js"));
  }
  await attempt("other read", () => fetch(victim + "/hit-read", {credentials: "include"}).then(seen));
  await attempt("other blind", () => fetch(victim + "/hit-blind", {
    mode: "no-cors", credentials: "include"}).then(seen));
  await attempt("other post", () => fetch(victim + "/hit-post", {
    mode: "no-cors", method: "POST", credentials: "include", body}).then(seen));
  await attempt("other socket", () => socket(victim.replace("http", "ws") + "/hit-ws"));
  await attempt("other image", () => element("img", "src", victim + "/hit-img"));
  await attempt("other script", () => element("script", "src", victim + "/hit-js"));
  await attempt("other frame", () => framed(victim + "/hit-frame"));
  await attempt("other form", () => form(victim + "/hit-form", "application/x-www-form-urlencoded"));
  await attempt("other worker", () => navigator.serviceWorker.register(victim + "/sw.js"));
  document.cookie = "ash-preview=forged; Path=/x";
  document.cookie = "tossed=1; Domain=localhost; Path=/";
  document.cookie = "tossed=2; Domain=127.0.0.1; Path=/";
  const sw = await navigator.serviceWorker.register("/sw.js", {scope: "/"});
  came["own worker"] = sw.scope;
  return came;
})()"""


async def test_a_hostile_page_reaches_neither_the_hive_nor_another_sandbox_or_share(
    browser: Browser, hive: Hive, hive_url: str, victim: Site, hostile: Site
):
    base = hive_url.removesuffix("/mcp")
    port = urlsplit(base).port
    await hostile.box.files.write("sw.js", b"self.addEventListener('fetch', () => {});")
    await victim.box.files.write("sw.js", b"self.addEventListener('fetch', () => {});")
    seen = await browser.tab(victim.url)  # so the browser has the victim's cookie, and its page is open
    assert await seen.run("fetch('/control').then(r => r.text())") == "seen"
    assert len(await victim.asked("/control")) == 1, "the log tells of what reaches the server"
    before = {info.id for info in await hive.list()}
    tab = await browser.tab(hostile.url)
    words = {
        "hive": base,
        "hives": [base, f"http://localhost:{port}", f"http://{urlsplit(victim.origin).hostname}.:{port}"],
        "victim": victim.origin,
        "box": victim.box.id,
        "port": PORT,
    }
    came: dict[str, Any] = await tab.run(ATTACK % {name: json.dumps(value) for name, value in words.items()})
    reached = {
        name: what
        for name, what in came.items()
        if not str(what).startswith("kept out: ") and what not in ("closed", "opaque", "sent")
    }
    assert reached == {"own worker": hostile.origin + "/"}
    assert await victim.asked("hit") == [], "nothing came through to the other sandbox, blindly either"
    assert {info.id for info in await hive.list()} == before, "nothing was spawned or destroyed"
    assert await tab.run("document.cookie") == "inside=1", "no cookie for more than its own host"

    for own in (base, f"http://localhost:{port}"):
        page = await browser.tab(own + "/")
        assert "Agent Sandbox Hive" in await page.run("document.body.innerText")
        assert await page.run("document.cookie") == ""
        workers = "navigator.serviceWorker.getRegistrations().then(all => all.length)"
        assert await page.run(workers) == 0


async def test_the_hives_own_origin_shows_no_page_of_a_sandbox(browser: Browser, hive_url: str, hostile: Site):
    tab = await browser.tab(hostile.box.port_url(PORT) + "hit-shown")
    assert json.loads(await tab.run("document.body.innerText"))["error"]["kind"] == "permission_denied"
    assert await hostile.asked("hit-shown") == []


async def test_a_revoked_share_closes_the_page_its_websocket_too(browser: Browser, hive: Hive, victim: Site):
    share = await victim.box.share(ports=[PORT])
    url = share.previews[PORT]
    tab = await browser.tab(url)
    await tab.run("window.ws = new WebSocket(`ws://${location.host}/second`); ws.onclose = () => { window.over = 1 }")
    await tab.until("ws.readyState === 1")
    assert await victim.box.revoke_shares(share.id) == [share.id]
    await tab.until("window.over === 1")
    assert await tab.run("fetch('/').then(r => r.status)") == 401
    assert await tab.run(f"fetch({json.dumps(url)}).then(r => r.status)") == 401
    with pytest.raises(errors.NotFound):
        await victim.box.revoke_shares(share.id)
