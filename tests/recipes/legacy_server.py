"""A stdio MCP server of the handshake era only, in the standard library: what an old server looks like from outside.

Before `initialize` it answers nothing else, and it knows no version newer than 2024-11-05, or than the one it is told.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import uuid
from typing import Any

TOOLS = [
    {
        "name": name,
        "description": description,
        "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}},
    }
    for name, description in (
        ("echo", "Say it back"),
        ("whoami", "The variable WHO"),
        ("steps", "Report progress and a log message"),
        ("wait", "Wait until the call is cancelled"),
        ("die", "End the server during the call"),
        ("ask", "Ask the caller's user twice"),
        ("think", "Ask the caller's model"),
        ("roots", "Ask for the caller's roots"),
    )
]
CANCELLED: dict[Any, threading.Event] = {}
ANSWERS: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}
WRITING = threading.Lock()


def send(message: dict[str, Any]) -> None:
    with WRITING:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


def text(said: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": said}]}


def ask(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Put a question to the client, and return its result or error."""
    name = str(uuid.uuid4())
    ANSWERS[name] = queue.SimpleQueue()
    send({"id": name, "method": method, "params": params})
    return ANSWERS[name].get(timeout=20)


def elicit(message: str) -> dict[str, Any]:
    form = {"type": "object", "properties": {"value": {"type": "string"}}}
    return ask("elicitation/create", {"message": message, "requestedSchema": form})


def call(number: Any, params: dict[str, Any]) -> None:
    name: str = params["name"]
    arguments: dict[str, Any] = params.get("arguments") or {}
    if name == "echo":
        send({"id": number, "result": text(arguments["text"])})
    elif name == "whoami":
        send({"id": number, "result": text(os.environ.get("WHO", "nobody"))})
    elif name == "steps":
        log = {"level": "info", "data": "at it"}
        send({"method": "notifications/message", "params": log})
        token = params.get("_meta", {}).get("progressToken")
        for step in (1, 2):
            send(
                {"method": "notifications/progress", "params": {"progressToken": token, "progress": step, "total": 2}}
            )
        send({"id": number, "result": text("done")})
    elif name == "wait":
        began = time.monotonic()
        with open(f"{arguments['text']}.begun", "w", encoding="utf-8"):
            pass  # a sign that the call is open
        CANCELLED[number].wait(20)
        with open(arguments["text"], "w", encoding="utf-8") as file:
            file.write("cancelled" if time.monotonic() - began < 19 else "never")
    elif name == "ask":
        first = elicit("first?")
        if "error" in first:
            return send({"id": number, "result": text(first["error"]["message"])})
        said = first["result"].get("content", {}).get("value", first["result"]["action"])
        second = elicit(f"after {said}?")["result"]["content"]["value"]
        send({"id": number, "result": text(f"{said}, then {second}")})
    elif name == "think":
        message = {"role": "user", "content": {"type": "text", "text": arguments["text"]}}
        answer = ask("sampling/createMessage", {"messages": [message], "maxTokens": 9})
        send({"id": number, "result": text(answer["result"]["content"]["text"])})
    elif name == "roots":
        answer = ask("roots/list", {})
        send({"id": number, "result": text(" ".join(root["uri"] for root in answer["result"]["roots"]))})
    elif name == "die":
        os._exit(7)
    else:
        send({"id": number, "error": {"code": -32602, "message": f"no tool {name}"}})


def main() -> None:
    greeted = False
    for line in sys.stdin:
        message: dict[str, Any] = json.loads(line)
        method, number = message.get("method"), message.get("id")
        params: dict[str, Any] = message.get("params") or {}
        if method == "initialize":
            greeted = True
            result: dict[str, Any] = {
                "protocolVersion": sys.argv[1] if sys.argv[1:] else "2024-11-05",
                "capabilities": {"tools": {}, "logging": {}},
                "serverInfo": {"name": "old", "version": "1"},
                "instructions": "An old server.",
            }
            send({"id": number, "result": result})
        elif not greeted:
            sys.exit("spoken to before initialize")
        elif method == "tools/list":
            send({"id": number, "result": {"tools": TOOLS}})
        elif method == "tools/call":
            CANCELLED[number] = threading.Event()
            threading.Thread(target=call, args=(number, params), daemon=True).start()
        elif method is None:
            ANSWERS[str(number)].put(message)
        elif method == "notifications/cancelled":
            CANCELLED.setdefault(params.get("requestId"), threading.Event()).set()
        elif number is not None:
            send({"id": number, "error": {"code": -32601, "message": "Method not found"}})


if __name__ == "__main__":
    main()
