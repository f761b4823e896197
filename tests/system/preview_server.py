"""A server that runs inside a sandbox: files of its folder, a log of what it was asked, and a WebSocket that says when
a page has changed. Nothing but the standard library is there.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from pathlib import Path

KINDS = {".html": "text/html", ".js": "text/javascript", ".json": "application/json"}
asked: list[str] = []


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        await reader.readexactly(int(fields.get("content-length", 0)))
        path = target.partition("?")[0]
        if path == "/log":
            answer(writer, json.dumps(asked).encode(), ".json")
        elif "sec-websocket-key" in fields:
            asked.append(f"WEBSOCKET {target} {fields.get('origin', '')}")
            await tell_changes(writer, fields["sec-websocket-key"])
        else:
            asked.append(f"{method} {target} {json.dumps(sorted(fields.items()))}")
            answer(writer, *content(path.lstrip("/") or "index.html"))
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


def content(name: str) -> tuple[bytes, str]:
    file = Path(name)
    return file.read_bytes() if file.is_file() else b"seen", file.suffix or ".html"


def answer(writer: asyncio.StreamWriter, body: bytes, suffix: str) -> None:
    lines = (
        "HTTP/1.1 200 OK",
        f"content-type: {KINDS.get(suffix, 'text/plain')}",
        f"content-length: {len(body)}",
        "connection: close",
        "cache-control: no-store",
        "service-worker-allowed: /",
        "set-cookie: inside=1; Path=/",
    )
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)


async def tell_changes(writer: asyncio.StreamWriter, key: str) -> None:
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
    accept = base64.b64encode(digest).decode()
    writer.write(
        f"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        f"sec-websocket-accept: {accept}\r\n\r\n".encode()
    )
    before = content("index.html")
    while content("index.html") == before:
        await asyncio.sleep(0.1)
        if writer.is_closing():
            return
    writer.write(b"\x81\x06reload")
    await writer.drain()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
