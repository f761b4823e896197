"""The table of the doors to one sandbox: whoever may come with whatever credential, and every spelling of its path."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httpx

from ash_hub.backends.kept_keys import change_api_keys
from ash_hub.chosen_backend import open_documents
from ash_hub.serving.auth import key_file
from ash_hub.settings import HubSettings
from ash_mcp import Hive, Sandbox
from ash_router.admission.api_keys import KeyChange, add_key, revoke_keys

__all__ = ["TRICKS", "Table", "check", "doors_of", "open_table"]

PORT: Final = 8000
_SERVER: Final = """
import http.server
class Port(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = b"port of %s"
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", %d), Port).serve_forever()
"""
_VERSION: Final = "2026-07-28"
_META: Final[Mapping[str, Any]] = {
    "_meta": {
        "io.modelcontextprotocol/protocolVersion": _VERSION,
        "io.modelcontextprotocol/clientCapabilities": {},
    }
}
_LIST: Final[Mapping[str, Any]] = {"jsonrpc": "2.0", "id": 7, "method": "tools/list", "params": _META}
_MCP: Final = {
    "accept": "application/json, text/event-stream",
    "content-type": "application/json",
    "mcp-protocol-version": _VERSION,
    "mcp-method": "tools/list",
}
_WEBSOCKET: Final = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}

DOORS: Final[Mapping[str, str]] = {
    "mcp": "mcp",
    "files": "files/notes",
    "ports": f"ports/{PORT}/notes",
    "terminal": "terminal",
}
"""What stands behind `/s/<sandbox>/` at each door."""

_OWNER: Final = frozenset({"the owner's key", "the owner's key as a URL's user"})
_SHARES: Final = frozenset({"a share of a tool and the port", "a share of tools"})
_OPENS: Final[Mapping[str, frozenset[str]]] = {
    "mcp": _OWNER | _SHARES,
    "files": _OWNER | {"a ticket"},
    "ports": _OWNER | {"a share of a tool and the port"},
    "terminal": _OWNER,
}
_OPENS_OTHER: Final[Mapping[str, frozenset[str]]] = {
    "mcp": _OWNER | {"a share of another sandbox"},
    "files": _OWNER,
    "ports": _OWNER | {"a share of another sandbox"},
    "terminal": _OWNER,
}
_ANOTHERS: Final = "another principal's key"

DEAD: Final = (
    "no token of this hive", "a forged key", "an expired key", "a revoked key", "an expired share",
    "a revoked share", "a forged share", "a cut share", "a share of a sandbox that has ended",
    "a ticket beside a bad key",
)  # fmt: skip
"""Refused as 401 wherever a door is."""
DEAD_TICKETS: Final = (
    "a used ticket", "an expired ticket", "a ticket to write", "a ticket of a sandbox that has ended",
    "a forged ticket", "a ticket of a revoked key",
)  # fmt: skip
"""Refused as 401 at the door of files; elsewhere a query says nothing, and whoever comes is the local user."""
CREDENTIALS: Final = (
    *("the owner's key", "the owner's key as a URL's user", "a share of a tool and the port", "a share of tools"),
    *("a share of another port", "a share of another sandbox", "a ticket", "none", _ANOTHERS, "a key in the query"),
    *("a share in the query", "a share in a cookie", "a key in a cookie", "two keys", *DEAD, *DEAD_TICKETS),
)

TRICKS: Final[Mapping[str, str | None]] = {
    "/s/{id}/{rest}": "own",
    "/s/{name}/{rest}": "named",
    "/s/{other}/{rest}": "other",
    "/s/bobsbox/{rest}": "bobs",
    "/s/annsgone/{rest}": None,
    "/s/{gone}/{rest}": None,
    "/s/nobody/{rest}": None,
    "/s/{id}/{rest}/..": None,
    "/s/{id}/{rest}/../{rest}": None,
    "/s/{id}/{rest}/../../../mcp": None,
    "/s/{id}/{rest}/%2e%2e/%2e%2e/mcp": None,
    "/s/{id}/{rest}/..%2f..%2f_ash%2fclaim": None,
    "/s/{id}/{rest}/%252e%252e/%252e%252e/mcp": None,
    "/s/{id}/./{rest}": None,
    "/s/{id}/../{other}/{rest}": None,
    "/s/{other}/../{id}/{rest}": None,
    "/s/{id}%2f..%2f{other}/{rest}": None,
    "/s/../s/{id}/{rest}": None,
    "/s/%2e%2e/s/{id}/{rest}": None,
    "/s/{id}%2f{rest}": None,
    "/s%2f{id}/{rest}": None,
    "/s/{id}%252f{rest}": None,
    "/s/%2573{id}/{rest}": None,
    "/s/{id}/%{hex}{cut}": None,
    "/s/{id}/%25{hex}{cut}": None,
    "/s/{id}%00/{rest}": None,
    "/s/{id}/{rest}%00": None,
    "/s/{id}/{rest}%00/../../mcp": None,
    "/s\\{id}\\{rest}": None,
    "/s/{id}\\{rest}": None,
    "/s/{id}%5c{rest}": None,
    "/s/{id}/{rest}\\..\\..\\mcp": None,
    "/s/{id}/{rest}%5c..%5cmcp": None,
    "//s/{id}/{rest}": None,
    "/s//{id}/{rest}": None,
    "/s/{id}//{rest}": None,
    "/S/{id}/{rest}": None,
    "/s/{id}/{rest};x": None,
    "/s/{id};x/{rest}": None,
    "/s/{id}/{rest}%": None,
    "/s/{id}/{rest}/%ff%fe/../x": None,
    "/_ash/{rest}": None,
    "/s/{id}/_ash/{rest}": None,
    "/s/{id}/_ash/health": None,
    "/_ash/claim": None,
    "/{rest}/s/{id}": None,
    "http://{host}/s/{id}/{rest}": None,
    "http://{host}/s/{other}/{rest}": None,
    "http://other.test/s/{id}/{rest}": None,
    "http:/s/{id}/{rest}": None,
    "/s/{id}/{rest}?session=bobsbox": "by query",
    "/s/{id}/{rest}#x": None,
    "/s/{id}/files/": "folder",
    "/s/{id}/files?path=notes": "folder",
    "/s/{id}/files?path=../workspace/notes": "folder",
    "/s/{id}/files/../files/notes": None,
    "/s/{id}/files/..": None,
    "/s/{id}/files/%2e%2e/{other}/files/notes": None,
    "/s/{id}/files%2fnotes": None,
    "/s/{id}/files/%6eotes": None,
    "/s/{id}/files/%256eotes": None,
    "/s/{id}/files//notes": None,
    "/s/{id}/files/..\\notes": None,
    "/s/{id}/files/_ash/health": None,
    "/s/{id}/ports/8001/": None,
    "/s/{id}/ports/9000/../8000/": None,
    "/s/{id}/ports/9000%2f..%2f8000/": None,
    "/s/{id}/ports/%38000/": None,
    "/s/{id}/ports/08000/": None,
    "/s/{id}/ports/8000%2f": None,
    "/s/{id}/ports/8000;9000/": None,
    "/s/{id}/ports/9000@localhost:8000/": None,
    "/s/{id}/ports/-8000/": None,
    "/s/{id}/ports/80000/": None,
    "/s/{id}/PORTS/8000/": None,
    "/s/{id}/ports/8000//a": None,
    "/s/{id}/ports/8000/./a": None,
    "/s/{id}/ports/8000/a%2fb": None,
    "/s/{id}/ports/8000/a%00b": None,
    "/s/{id}/ports/": None,
    "/s/{id}/ports": None,
    "/mcp": "hive",
    "/mcp/in/run1": "hive",
    "/spawn": None,
}
"""What is asked for, and whose door that is; None: nobody's. `{rest}` is what stands behind the sandbox at a door, and
`{hex}{cut}` the same with its first letter percent-encoded."""

SAME: Final = {
    "mcp": ("/s/{id}%2f{rest}", "/s%2f{id}/{rest}", "/s/{id}/%{hex}{cut}"),
    "ports": ("/s/{id}/{rest}/%252e%252e/%252e%252e/mcp", "/s/{id}/{rest}%5c..%5cmcp", "/s/{id}/{rest};x"),
}
"""Tricks that lead to the door itself: one path of it alone is looked for after decoding, or the server inside gets it
as it is."""


@dataclass
class Table:
    """A hive with two owners, their sandboxes, and every credential of the table."""

    url: str
    http: httpx.AsyncClient
    box: Sandbox
    other: Sandbox
    gone: str
    headers: dict[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    queries: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def base(self) -> str:
        return self.url.removesuffix("/mcp")

    def target(self, trick: str, door: str) -> str:
        """Return a row's target at a door, as it is sent."""
        rest = DOORS[door]
        return trick.format(
            id=self.box.id,
            name=self.box.session,
            other=self.other.id,
            gone=self.gone,
            rest=rest,
            host=urlsplit(self.base).netloc,
            hex=f"{ord(rest[0]):02x}",
            cut=rest[1:],
        )

    async def ask(self, target: str, door: str, credential: str) -> tuple[int, str, str]:
        """Send a target as it is written; return status, body, and who says that it answers."""
        if credential == "a ticket":
            self.queries[credential] = await self.ticket("download_url", self.box.id)  # a row may use it up
        if credential in self.queries:
            target += f"{'&' if '?' in target else '?'}{self.queries[credential]}"
        more = {"mcp": _MCP, "terminal": _WEBSOCKET}.get(door, {})
        headers = [*more.items(), *self.headers.get(credential, {}).items()]
        if credential == "two keys":
            headers += [("authorization", "Bearer x")]
        method, body = ("POST", json.dumps(_LIST)) if door == "mcp" else ("GET", None)
        raw = {"target": target.encode("latin-1")}  # httpx would make the path of a URL canonical
        request = self.http.build_request(method, self.base, headers=headers, content=body, extensions=raw)
        answer = await self.http.send(request, stream=True)
        try:
            said = "" if answer.status_code == 101 else (await answer.aread()).decode("utf-8", "replace")
        finally:
            await answer.aclose()
        return answer.status_code, said, answer.headers.get("ash-origin", "")

    async def ticket(self, tool: str, sandbox: str, key: str | None = None, **more: Any) -> str:
        """Return the query of a new ticket for a sandbox's notes, made with the owner's key or another of theirs."""
        params = {"name": tool, "arguments": {"session": sandbox, "path": "notes", **more}, **_META}
        message = {"jsonrpc": "2.0", "id": 8, "method": "tools/call", "params": params}
        credential = self.headers["the owner's key"] if key is None else _bearer(key)
        headers = {**_MCP, **credential, "mcp-method": "tools/call", "mcp-name": tool}
        answer = await self.http.post(self.url, headers=headers, json=message)
        text = answer.text.split("data: ")[-1].split("\n")[0]
        url: str = json.loads(text)["result"]["structuredContent"]["url"]
        return url.partition("?")[2]


def has_opened(status: int, said: str) -> bool:
    """Return whether an answer shows anything of a sandbox or of the hive."""
    shown = '"tools":[{' in said or '"name": "notes"' in said or "notes of " in said or "port of " in said
    return shown or status == 101


def opens(trick: str, door: str, credential: str) -> bool:
    """Return whether a row's target opens to a credential."""
    whose = "own" if trick in SAME.get(door, ()) else TRICKS[trick]
    if whose is None:
        return False
    if whose == "hive":
        return door == "mcp" and credential not in (*DEAD, "two keys") and "a share of" not in credential
    if whose == "bobs":
        return credential == _ANOTHERS
    if whose == "folder":
        return credential in _OWNER
    if whose == "other":
        return credential in _OPENS_OTHER[door]
    if credential == "a ticket" and whose != "own":
        return False  # it is for one path
    return credential in _OPENS[door]


def doors_of(trick: str) -> Sequence[str]:
    """Return the doors at which a row is asked for: each, by its own request, if the row names none."""
    return [door for door in DOORS if trick.startswith(f"/s/{{id}}/{door}")] or list(DOORS)


async def check(table: Table, trick: str, door: str) -> None:
    """Ask for one row at one door with each credential."""
    target = table.target(trick, door)
    for credential in CREDENTIALS:
        status, said, origin = await table.ask(target, door, credential)
        seen = (credential, target, status, origin, said[:300])
        should = opens(trick, door, credential)
        assert has_opened(status, said) == should, seen
        if should:
            assert status in (200, 101), seen
            continue
        if '"tools":[]' in said:  # a share of ports alone opens an empty list
            assert (door, credential) == ("mcp", "a share of another port"), seen
            continue
        assert 400 <= status < 500, seen
        if TRICKS[trick] in ("own", "named", "other", "bobs"):
            dead = credential in DEAD or (door == "files" and credential in (*DEAD_TICKETS, "a ticket"))
            assert (status == 401) == dead and origin == "hub", seen
        others = ("own", "named", "other") if credential == _ANOTHERS else ("bobs",) if credential in _OWNER else ()
        if TRICKS[trick] in others:
            assert status == 404, seen  # as where there is no such sandbox


@asynccontextmanager
async def open_table(url: str, state_dir: Path) -> AsyncGenerator[Table]:
    """Make both owners, their sandboxes and all credentials on a hive of this process's environment.

    Args:
        state_dir: The hive's, where its backend does not keep the keys.
    """
    keys = await _make_keys(state_dir)
    async with (
        httpx.AsyncClient(trust_env=False, timeout=60) as http,
        Hive(url, keys["ann"]) as ann,
        Hive(url, keys["bob"]) as bob,
    ):
        await _until_known(http, url, keys, "ann", "bob", "lent")
        box, other, bobs, gone = (
            await ann.spawn("echo", session="annsbox", ports=[PORT, 9000]),
            await ann.spawn("echo", session="annsother", ports=[PORT]),
            await bob.spawn("echo", session="bobsbox", ports=[PORT]),
            await ann.spawn("echo", session="annsgone", ports=[PORT]),
        )
        table = Table(url, http, box, other, gone.id)
        table.headers["the owner's key"] = _bearer(keys["ann"])
        for each in (box, other, bobs, gone):
            await each.files.write("notes", f"notes of {each.session}")
        for each in (box, other, bobs):
            await each.background(["python3", "-c", _SERVER % (each.session, PORT)])
            with anyio.fail_after(30):
                while (await each.exec(f"exec 3<>/dev/tcp/127.0.0.1/{PORT}")).exit_code:
                    await anyio.sleep(0.05)
        await _fill(table, keys, gone)
        table.queries["a ticket of a revoked key"] = await table.ticket("download_url", box.id, keys["lent"])
        await _revoke(state_dir, "lent")
        await _until_known(http, url, keys, "ann", "bob")
        yield table
        for each in (box, other, bobs):
            await each.destroy()


async def _fill(table: Table, keys: Mapping[str, str], gone: Sandbox) -> None:
    """Make the credentials; `gone` ends."""
    box = table.box
    good = await box.share(tools=["echo"], ports=[PORT])
    others, dead = (
        await table.other.share(tools=["echo"], ports=[PORT]),
        await gone.share(tools=["echo"], ports=[PORT]),
    )
    expired, revoked = await box.share(ttl_seconds=0.001, ports=[PORT]), await box.share(ports=[PORT])
    tools, port = await box.share(tools=["echo"]), await box.share(ports=[9000])
    table.queries["a ticket of a sandbox that has ended"] = await table.ticket("download_url", gone.id)
    await gone.destroy()
    await box.revoke_shares(revoked.id)
    ticket = await table.ticket("download_url", box.id)
    user = base64.b64encode(f"{keys['ann']}:".encode()).decode()
    tokens = {
        "no token of this hive": "x",
        "a forged key": keys["ann"][:16] + keys["bob"][16:],
        "an expired key": keys["expired"],
        "a revoked key": keys["revoked"],
        "two keys": keys["ann"],
        "an expired share": expired.token,
        "a revoked share": revoked.token,
        "a forged share": good.token[:16] + others.token[16:],
        "a cut share": good.token[:-1],
        "a share of a sandbox that has ended": dead.token,
        "a ticket beside a bad key": "x",
        "a share of a tool and the port": good.token,
        "a share of tools": tools.token,
        "a share of another port": port.token,
        "a share of another sandbox": others.token,
        _ANOTHERS: keys["bob"],
    }
    table.headers |= {name: _bearer(token) for name, token in tokens.items()}
    table.headers |= {
        "the owner's key as a URL's user": {"authorization": f"Basic {user}"},
        "a share in a cookie": {"cookie": f"ash-preview={good.token}; ash_share={good.token}"},
        "a key in a cookie": {"cookie": f"authorization=Bearer {keys['ann']}; token={keys['ann']}"},
    }
    table.queries |= {
        "a used ticket": ticket,
        "an expired ticket": await table.ticket("download_url", box.id, ttl_seconds=0.001),
        "a ticket to write": await table.ticket("upload_url", box.id),
        "a forged ticket": ticket[:-4] + "aaaa",
        "a ticket beside a bad key": await table.ticket("download_url", box.id),
        "a key in the query": f"access_token={keys['ann']}&token={keys['ann']}",
        "a share in the query": f"ash_share={good.token}&token={good.token}",
    }
    status, said, _ = await table.ask(table.target("/s/{id}/{rest}", "files"), "files", "a used ticket")
    assert (status, said) == (200, "notes of annsbox")


async def _make_keys(state_dir: Path) -> dict[str, str]:
    """Make keys of two owners, one more of the first, and two that are good no more."""
    made: dict[str, str] = {}
    for name, subject, ttl_seconds in (
        *(("ann", "ann", None), ("bob", "bob", None), ("lent", "ann", None)),
        *(("revoked", "ann", None), ("expired", "ann", 0.001)),
    ):
        add = partial(add_key, now=time.time(), name=name, subject=subject, ttl_seconds=ttl_seconds)
        _, made[name] = await _change_keys(state_dir, add)
    await _revoke(state_dir, "revoked")
    return made


async def _revoke(state_dir: Path, name: str) -> None:
    await _change_keys(state_dir, lambda keys: revoke_keys(keys, [name]))


async def _change_keys(state_dir: Path, change: KeyChange[Any]) -> Any:
    settings = HubSettings(state_dir=state_dir)
    if settings.backend["kind"] == "local":
        return key_file(state_dir).change(change)
    async with open_documents(settings) as documents:
        return await change_api_keys(documents, change)


async def _until_known(http: httpx.AsyncClient, url: str, keys: Mapping[str, str], *good: str) -> None:
    """Wait until the hive takes the good keys alone: it follows changes within some seconds."""

    async def is_taken(key: str) -> bool:
        return (await http.post(url, headers={**_MCP, **_bearer(key)}, json=_LIST)).status_code == 200

    with anyio.fail_after(30):
        while {name for name in keys if await is_taken(keys[name])} != set(good):
            await anyio.sleep(0.1)


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}
