"""The HTTP APIs by which hosts ask a model: how each says what it offers and what came back, and wants an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

__all__ = ["APIS", "Api", "Call", "Move", "Request", "is_tool"]

_SEARCH: Final = "ToolSearch"
_CALL_DEFERRED: Final = "tool_call"
"""How Claude Code's model gets at deferred tools, and Qwen Code's. A search waits for servers, too."""

_SHELL: Final = "exec_command"
"""Codex's own, which gives a server time to come up."""

Json = dict[str, Any]
Events = Sequence[tuple[str, Json]]
"""What is streamed: the name of each event, if the API has names, and its data."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model called earlier in the conversation."""

    name: str
    result: str | None
    """None while the host has brought nothing back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What the model does next: it calls a tool, or says something and is done."""

    tool: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    text: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What a host asks the model."""

    tools: Sequence[str]
    calls: Sequence[Call]
    """Those of the whole conversation, oldest first."""
    deferred: Sequence[str] = ()
    """Tools of which only the names are told, in a message, by a host that has a tool for searching them."""

    def offered(self, tool: str) -> str | None:
        """Return the name under which the host offers a tool of the hive, or tells of it."""
        return next((name for name in (*self.tools, *self.deferred) if is_tool(name, tool)), None)

    def called(self, tool: str) -> bool:
        """Say whether the model called a tool of the hive."""
        return any(is_tool(call.name, tool) for call in self.calls)

    def result(self, tool: str) -> str | None:
        """Return what came of the first call of a tool of the hive."""
        return next((call.result for call in self.calls if is_tool(call.name, tool)), None)

    def wait(self) -> Move:
        """Return how the model waits, once, for a hive that the host has not reached yet."""
        ways = {_SEARCH: {"query": "ash sandbox", "max_results": 50}, _SHELL: {"cmd": "sleep 3"}}
        way = next((way for way in ways if way in self.tools and not self.called(way)), None)
        return Move(tool=way, arguments=ways[way]) if way else Move(text="I see no hive.")

    def move(self, name: str, arguments: Mapping[str, Any]) -> Move:
        """Return how the model calls a tool that is offered under this name: at once, or the search before it."""
        if name in self.tools:
            return Move(tool=name, arguments=arguments)
        if _CALL_DEFERRED in self.tools:
            return Move(tool=_CALL_DEFERRED, arguments={"name": name, "arguments": arguments})
        return Move(tool=_SEARCH, arguments={"query": f"select:{','.join(self.deferred)}", "max_results": 50})


@dataclass(frozen=True, slots=True)
class Api:
    """One of the APIs."""

    path: re.Pattern[str]
    read: Callable[[Json], Request]
    whole: Callable[[Move], Json]
    events: Callable[[Move], Events]
    last_line: str = ""


def is_tool(name: str, tool: str) -> bool:
    """Say whether a host's name means this tool of the hive: `mcp__ash__spawn`, `ash-spawn` or `spawn`."""
    return re.fullmatch(rf"(.*ash[-_/.]+)?{re.escape(tool)}", name) is not None


def _request(
    tools: Sequence[str], called: Mapping[str, str], results: Mapping[str, Any], said: object = None
) -> Request:
    defers = not {_SEARCH, _CALL_DEFERRED}.isdisjoint(tools)
    told = re.findall(r"mcp__ash__[\w-]+", json.dumps(said)) if defers else ()
    calls = [Call(name, _text(results.get(key))) for key, name in called.items()]
    return Request(tools, calls, list(dict.fromkeys(told)))


def _text(result: Any) -> str | None:
    return result if result is None or isinstance(result, str) else json.dumps(result)


def _id() -> str:
    return f"call_{uuid4().hex}"


# Anthropic's Messages


def _read_messages(body: Json) -> Request:
    blocks = [block for said in body["messages"] if isinstance(said["content"], list) for block in said["content"]]
    called = {block["id"]: block["name"] for block in blocks if block["type"] == "tool_use"}
    results = {block["tool_use_id"]: block.get("content", "") for block in blocks if block["type"] == "tool_result"}
    return _request([tool["name"] for tool in body.get("tools", ())], called, results, body["messages"])


def _message(move: Move) -> Json:
    block: Json = {"type": "text", "text": move.text}
    if move.tool:
        block = {"type": "tool_use", "id": _id(), "name": move.tool, "input": move.arguments}
    return {
        "id": _id(),
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [block],
        "stop_reason": "tool_use" if move.tool else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def _message_events(move: Move) -> Events:
    message = _message(move)
    [block] = message["content"]
    begun: Json = {**block, "text": ""}
    delta = {"type": "text_delta", "text": move.text}
    if move.tool:
        begun = {**block, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(move.arguments)}
    ended = {"delta": {"stop_reason": message["stop_reason"], "stop_sequence": None}, "usage": {"output_tokens": 1}}
    events: Sequence[tuple[str, Json]] = (
        ("message_start", {"message": {**message, "content": [], "stop_reason": None}}),
        ("content_block_start", {"index": 0, "content_block": begun}),
        ("content_block_delta", {"index": 0, "delta": delta}),
        ("content_block_stop", {"index": 0}),
        ("message_delta", ended),
        ("message_stop", {}),
    )
    return [(kind, {"type": kind, **data}) for kind, data in events]


# OpenAI's Chat Completions


def _read_chat(body: Json) -> Request:
    tools = [tool["function"]["name"] for tool in body.get("tools") or () if tool["type"] == "function"]
    calls = [call for said in body["messages"] for call in said.get("tool_calls") or ()]
    results = {said["tool_call_id"]: said["content"] for said in body["messages"] if said["role"] == "tool"}
    return _request(tools, {call["id"]: _chat_name(call["function"]) for call in calls}, results, body["messages"])


def _chat_name(function: Json) -> str:
    return json.loads(function["arguments"])["name"] if function["name"] == _CALL_DEFERRED else function["name"]


def _chat(move: Move) -> Json:
    message: Json = {"role": "assistant", "content": move.text or None}
    if move.tool:
        function = {"name": move.tool, "arguments": json.dumps(move.arguments)}
        message["tool_calls"] = [{"index": 0, "id": _id(), "type": "function", "function": function}]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if move.tool else "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    head = {"id": _id(), "created": 0, "model": "scripted"}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}


def _chat_events(move: Move) -> Events:
    whole = _chat(move)
    [choice] = whole["choices"]
    chunk = {**whole, "object": "chat.completion.chunk"}
    delta = {"index": 0, "delta": choice["message"], "finish_reason": None}
    end: Json = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    return [("", {**chunk, "choices": [delta], "usage": None}), ("", {**chunk, "choices": [end]})]


# OpenAI's Responses


def _read_responses(body: Json) -> Request:
    items: list[Json] = body["input"]
    called = {item["call_id"]: _join(item) for item in items if item.get("type") == "function_call"}
    results = {item["call_id"]: item["output"] for item in items if item.get("type") == "function_call_output"}
    tools: list[str] = []
    for tool in body.get("tools", ()):
        inside = tool["tools"] if tool["type"] == "namespace" else ({"name": tool.get("name", tool["type"])},)
        space = {"namespace": tool["name"]} if tool["type"] == "namespace" else {}
        tools += [_join({**one, **space}) for one in inside]
    return _request(tools, called, results)


def _join(named: Json) -> str:
    return f"{named['namespace']}/{named['name']}" if named.get("namespace") else named["name"]


def _response_item(move: Move) -> Json:
    if not move.tool:
        text: Json = {"type": "output_text", "text": move.text, "annotations": []}
        return {"id": _id(), "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    space, _, name = move.tool.rpartition("/")
    item = {"id": _id(), "type": "function_call", "call_id": _id(), "name": name, "status": "completed"}
    item["arguments"] = json.dumps(move.arguments)
    return {**item, "namespace": space} if space else item


def _response(move: Move) -> Json:
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    head = {"id": _id(), "object": "response", "created_at": 0, "model": "scripted"}
    return {**head, "status": "completed", "output": [_response_item(move)], "usage": usage}


def _response_events(move: Move) -> Events:
    whole = _response(move)
    [item] = whole["output"]
    events: Sequence[tuple[str, Json]] = (
        ("response.created", {"response": {**whole, "status": "in_progress", "output": []}}),
        ("response.output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress"}}),
        ("response.output_item.done", {"output_index": 0, "item": item}),
        ("response.completed", {"response": whole}),
    )
    return [(kind, {"type": kind, "sequence_number": at, **data}) for at, (kind, data) in enumerate(events)]


# Gemini's generateContent


def _read_gemini(body: Json) -> Request:
    tools = [tool["name"] for group in body.get("tools", ()) for tool in group.get("functionDeclarations", ())]
    parts = [part for said in body["contents"] for part in said.get("parts", ())]
    called = [part["functionCall"] for part in parts if "functionCall" in part]
    results = [part["functionResponse"] for part in parts if "functionResponse" in part]
    return _request(tools, {one["id"]: one["name"] for one in called}, {one["id"]: one["response"] for one in results})


def _gemini(move: Move) -> Json:
    part: Json = {"text": move.text}
    if move.tool:
        call = {"id": _id(), "name": move.tool, "args": move.arguments}
        part = {"functionCall": call, "thoughtSignature": "bm9uZQ=="}
    candidate = {"index": 0, "content": {"role": "model", "parts": [part]}, "finishReason": "STOP"}
    usage = {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "scripted"}


APIS: Final[Sequence[Api]] = (
    Api(re.compile(r"/messages$"), _read_messages, _message, _message_events),
    Api(re.compile(r"/chat/completions$"), _read_chat, _chat, _chat_events, "data: [DONE]\n\n"),
    Api(re.compile(r"/responses$"), _read_responses, _response, _response_events),
    Api(re.compile(r":(stream)?[gG]enerateContent$"), _read_gemini, _gemini, lambda move: [("", _gemini(move))]),
)
