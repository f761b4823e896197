"""The file from which the stdio bridge answers before it has a hive: `python -m tests.hive_face` writes it anew."""

from __future__ import annotations

import json
from typing import Any, Final

import httpx
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from ash_mcp._protocol import build_request, parse_message
from ash_mcp.bridge.hive_face import FACE_FILE
from tests.hive_process import running_hive

__all__ = ["read_face"]

_LISTS: Final = ("tools/list", "prompts/list", "resources/list", "resources/templates/list")
_HELLO: Final[dict[str, Any]] = {
    "protocolVersion": HANDSHAKE_PROTOCOL_VERSIONS[-1],
    "capabilities": {},
    "clientInfo": {"name": "ash-bridge", "version": "1"},
}
_ACCEPT: Final = {"accept": "application/json, text/event-stream"}


def read_face(url: str) -> dict[str, Any]:
    """Return what a hive without sandboxes answers in both eras."""
    with httpx.Client() as client:
        return {
            "handshake_versions": list(HANDSHAKE_PROTOCOL_VERSIONS),
            "handshake": _handshake(client, url),
            "stateless": {method: _stateless(client, url, method) for method in ("server/discover", *_LISTS)},
        }


def _stateless(client: httpx.Client, url: str, method: str) -> dict[str, Any]:
    request = build_request(method, {}, request_id=1)
    return _result(client.post(url, headers=dict(request.headers), content=request.body))


def _handshake(client: httpx.Client, url: str) -> dict[str, Any]:
    headers = dict(_ACCEPT)

    def ask(method: str, params: dict[str, Any]) -> httpx.Response:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return client.post(url, headers=headers, json=message)

    opened = ask("initialize", _HELLO)
    headers |= {"mcp-session-id": opened.headers["mcp-session-id"], "mcp-protocol-version": _HELLO["protocolVersion"]}
    client.post(url, headers=headers, json={"jsonrpc": "2.0", "method": "notifications/initialized"})
    results = {"initialize": _result(opened), **{method: _result(ask(method, {})) for method in ("ping", *_LISTS)}}
    client.delete(url, headers=headers)
    return results


def _result(response: httpx.Response) -> dict[str, Any]:
    body = response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        body = next(line for line in body.splitlines() if line.startswith("data: {")).removeprefix("data: ")
    message = parse_message(body.encode())
    assert message is not None, response.text
    return message["result"]


if __name__ == "__main__":
    with running_hive() as url:
        FACE_FILE.write_text(json.dumps(read_face(url), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
