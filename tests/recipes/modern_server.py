"""A stdio MCP server of the stateless era only, in the standard library; it asks by results that want another call."""

from __future__ import annotations

import json
import sys
from typing import Any

FORM = {"type": "object", "properties": {"value": {"type": "string"}}}
TOOLS = [{"name": name, "inputSchema": {"type": "object"}} for name in ("ask", "insist")]


def asking(message: str, state: str) -> dict[str, Any]:
    question = {"method": "elicitation/create", "params": {"message": message, "requestedSchema": FORM}}
    return {"resultType": "input_required", "inputRequests": {"it": question}, "requestState": state}


def called(params: dict[str, Any]) -> dict[str, Any]:
    state = params.get("requestState")
    if params["name"] == "insist":
        return asking("again?", "on")
    if state is None:
        return asking("first?", "begun")
    said = params["inputResponses"]["it"]["content"]["value"]
    if state == "begun":
        return asking(f"after {said}?", said)
    content = [{"type": "text", "text": f"{state}, then {said}"}]
    return {"resultType": "complete", "content": content}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "server/discover":
        cached = {"ttlMs": 0, "cacheScope": "private"}
        return {"resultType": "complete", "supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, **cached}
    if method == "tools/list":
        return {"resultType": "complete", "tools": TOOLS, "ttlMs": 0, "cacheScope": "private"}
    return called(params) if method == "tools/call" else None


def main() -> None:
    for line in sys.stdin:
        message: dict[str, Any] = json.loads(line)
        if "id" not in message:
            continue
        result = answer(message["method"], message.get("params") or {})
        said = {"result": result} if result is not None else {"error": {"code": -32601, "message": "Method not found"}}
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": message["id"], **said}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
