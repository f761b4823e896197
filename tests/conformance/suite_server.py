"""A server with the tools, resources and prompts that MCP's conformance suites call by name.

It runs in a sandbox of a hive, and beside it without one, so it imports nothing of the tests.
"""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

import anyio
import mcp_types as types
from fastmcp import Context, FastMCP
from fastmcp.prompts import Message
from fastmcp.tools import Tool, ToolResult
from mcp.shared.exceptions import MCPError
from pydantic import Field

__all__ = ["server"]

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
WAV = base64.b64encode(
    b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\x01\0\x01\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x10\0data\0\0\0\0"
).decode()

server: FastMCP[None] = FastMCP("conformance", dereference_schemas=False)


def text(value: str) -> types.TextContent:
    return types.TextContent(type="text", text=value)


def embedded(uri: str, mime_type: str, value: str) -> types.EmbeddedResource:
    content = types.TextResourceContents(uri=uri, mime_type=mime_type, text=value)
    return types.EmbeddedResource(type="resource", resource=content)


IMAGE = types.ImageContent(type="image", data=PNG, mime_type="image/png")


# Content


@server.tool
def test_simple_text() -> str:
    """Return text."""
    return "This is a simple text response for testing."


@server.tool(output_schema=None)
def test_image_content() -> ToolResult:
    """Return an image."""
    return ToolResult(content=[IMAGE])


@server.tool(output_schema=None)
def test_audio_content() -> ToolResult:
    """Return a sound."""
    return ToolResult(content=[types.AudioContent(type="audio", data=WAV, mime_type="audio/wav")])


@server.tool(output_schema=None)
def test_embedded_resource() -> ToolResult:
    """Return a resource."""
    return ToolResult(
        content=[embedded("test://embedded-resource", "text/plain", "This is an embedded resource content.")]
    )


@server.tool(output_schema=None)
def test_multiple_content_types() -> ToolResult:
    """Return a text, an image and a resource."""
    mixed = embedded("test://mixed-content-resource", "application/json", json.dumps({"test": "data", "value": 123}))
    return ToolResult(content=[text("Multiple content types test:"), IMAGE, mixed])


@server.tool
def test_error_handling() -> str:
    """Fail."""
    raise ValueError("This tool intentionally returns an error for testing")


@server.tool
def test_headers(region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})]) -> str:
    """Take an argument that a header mirrors."""
    return region


@server.tool
async def test_missing_capability(ctx: Context) -> str:
    """Refuse clients that cannot be asked for samples."""
    has_sampling = types.ClientCapabilities(sampling=types.SamplingCapability())
    if not ctx.session.check_client_capability(has_sampling):
        missing: Any = {"requiredCapabilities": {"sampling": {}}}
        raise MCPError(types.MISSING_REQUIRED_CLIENT_CAPABILITY, "the client must take samples", missing)
    return "it can"


class _Schema2020(Tool):
    """A tool whose schema uses what JSON Schema 2020-12 has."""

    async def run(self, arguments: dict[str, Any]) -> ToolResult:
        return ToolResult(content=[text(json.dumps(arguments))])


server.add_tool(
    _Schema2020(
        name="json_schema_2020_12_tool",
        description="Takes an address.",
        parameters={
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "$defs": {
                "address": {
                    "$anchor": "addressDef",
                    "type": "object",
                    "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
                }
            },
            "properties": {
                "name": {"type": "string"},
                "address": {"$ref": "#/$defs/address"},
                "contactMethod": {"type": "string", "enum": ["phone", "email"]},
                "phone": {"type": "string"},
                "email": {"type": "string"},
            },
            "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
            "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
            "then": {"required": ["phone"]},
            "else": {"required": ["email"]},
            "additionalProperties": False,
        },
    )
)


# While it runs


@server.tool
async def test_tool_with_logging(ctx: Context) -> str:
    """Say three things while running."""
    for said in ("Tool execution started", "Tool processing data", "Tool execution completed"):
        await ctx.info(said)
        await anyio.sleep(0.05)
    return "logged"


@server.tool
async def test_logging_tool(ctx: Context) -> str:
    """Say one thing while running."""
    await ctx.info("said")
    return "logged"


@server.tool
async def test_tool_with_progress(ctx: Context) -> str:
    """Tell of progress while running."""
    for done in (0, 50, 100):
        await ctx.report_progress(done, 100)
        await anyio.sleep(0.05)
    return "done"


@server.tool
async def test_reconnection(ctx: Context) -> str:
    """Let go of the stream in the middle, so that the client comes back for the answer."""
    await ctx.close_sse_stream()
    await anyio.sleep(0.1)
    return "Reconnection test completed successfully"


# Asking the client, in the handshake era


@server.tool
async def test_sampling(prompt: str, ctx: Context) -> str:
    """Ask the client's model."""
    asked = [types.SamplingMessage(role="user", content=text(prompt))]
    said = await ctx.session.create_message(  # pyright: ignore[reportDeprecated]
        asked, max_tokens=100, related_request_id=ctx.request_id
    )
    return f"LLM response: {getattr(said.content, 'text', said.content)}"


async def _elicit(ctx: Context, message: str, properties: dict[str, Any], required: list[str]) -> Any:
    schema = {"type": "object", "properties": properties, "required": required}
    return await ctx.session.elicit(message, schema, related_request_id=ctx.request_id)


@server.tool
async def test_elicitation(message: str, ctx: Context) -> str:
    """Ask the user."""
    properties = {
        "username": {"type": "string", "description": "User's response"},
        "email": {"type": "string", "description": "User's email address"},
    }
    said = await _elicit(ctx, message, properties, ["username", "email"])
    return f"User response: action={said.action}, content={json.dumps(said.content)}"


@server.tool
async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
    """Ask the user, with defaults."""
    properties = {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
        "verified": {"type": "boolean", "default": True},
    }
    said = await _elicit(ctx, "Review the defaults", properties, [])
    return f"Elicitation completed: action={said.action}, content={json.dumps(said.content)}"


@server.tool
async def test_elicitation_sep1330_enums(ctx: Context) -> str:
    """Ask the user to choose."""
    titled = [{"const": f"value{n}", "title": f"{word} Option"} for n, word in enumerate(("First", "Second"), 1)]
    plain = ["option1", "option2", "option3"]
    properties = {
        "untitledSingle": {"type": "string", "enum": plain},
        "titledSingle": {"type": "string", "oneOf": titled},
        "legacyEnum": {
            "type": "string",
            "enum": ["opt1", "opt2", "opt3"],
            "enumNames": ["Option One", "Option Two", "Option Three"],
        },
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": plain}},
        "titledMulti": {"type": "array", "items": {"anyOf": titled}},
    }
    said = await _elicit(ctx, "Choose", properties, [])
    return f"Elicitation completed: action={said.action}, content={json.dumps(said.content)}"


# Asking the client, in the stateless era


def ask_name(message: str, *names: str, kind: str = "string") -> Any:
    properties = {name: {"type": kind} for name in names}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": list(names)}
    return types.ElicitRequest(params=types.ElicitRequestFormParams(message=message, requested_schema=schema))


def ask_model(question: str, max_tokens: int) -> Any:
    message = types.SamplingMessage(role="user", content=text(question))
    return types.CreateMessageRequest(
        params=types.CreateMessageRequestParams(messages=[message], max_tokens=max_tokens)
    )


def asking(asked: dict[str, Any], state: str | None = None) -> types.InputRequiredResult:
    return types.InputRequiredResult(input_requests=asked, request_state=state)


def said(ctx: Context, name: str) -> Any:
    return (ctx.input_responses or {}).get(name)


Asked = str | types.InputRequiredResult


@server.tool
async def test_input_required_result_elicitation(ctx: Context) -> Asked:
    """Ask for a name."""
    answer: Any = getattr(said(ctx, "user_name"), "content", None)
    if not isinstance(answer, dict) or "name" not in answer:
        return asking({"user_name": ask_name("What is your name?", "name")})
    return f"Hello, {answer['name']}!"


@server.tool
async def test_input_required_result_sampling(ctx: Context) -> Asked:
    """Ask the model."""
    answer = said(ctx, "capital_question")
    if answer is None:
        return asking({"capital_question": ask_model("What is the capital of France?", 100)})
    return f"The model says {getattr(answer.content, 'text', answer.content)}"


@server.tool
async def test_input_required_result_list_roots(ctx: Context) -> Asked:
    """Ask for roots."""
    answer = said(ctx, "client_roots")
    if answer is None:
        return asking({"client_roots": types.ListRootsRequest()})
    return f"The roots are {[str(root.uri) for root in answer.roots]}"


@server.tool
async def test_input_required_result_request_state(ctx: Context) -> Asked:
    """Ask, and remember."""
    if said(ctx, "confirm") is None:
        return asking({"confirm": ask_name("Please confirm", "ok", kind="boolean")}, "remembered")
    return "state-ok" if ctx.request_state == "remembered" else f"state is {ctx.request_state}"


@server.tool
async def test_input_required_result_tampered_state(ctx: Context) -> Asked:
    """Ask, with a state that nobody may change."""
    if said(ctx, "confirm") is None:
        return asking({"confirm": ask_name("Please confirm", "ok", kind="boolean")}, "sealed")
    return f"state is {ctx.request_state}"


@server.tool
async def test_input_required_result_multiple_inputs(ctx: Context) -> Asked:
    """Ask three things at once."""
    asked = {
        "user_name": ask_name("What is your name?", "name"),
        "greeting": ask_model("Generate a greeting", 50),
        "client_roots": types.ListRootsRequest(),
    }
    if any(said(ctx, name) is None for name in asked):
        return asking(asked, "three")
    return "all three are here"


@server.tool
async def test_input_required_result_multi_round(ctx: Context) -> Asked:
    """Ask one thing after the other."""
    if said(ctx, "step2") is not None:
        return "two rounds"
    if said(ctx, "step1") is not None:
        return asking({"step2": ask_name("Step 2: What is your favorite color?", "color")}, "two")
    return asking({"step1": ask_name("Step 1: What is your name?", "name")}, "one")


@server.tool
async def test_input_required_result_capabilities(ctx: Context) -> Asked:
    """Ask only what the client can be asked."""
    return "nothing to ask" if said(ctx, "model") is not None else asking({"model": ask_model("2+2?", 9)})


@server.tool
async def test_streaming_elicitation(ctx: Context) -> Asked:
    """Ask after some progress."""
    await ctx.report_progress(1, 2)
    if said(ctx, "user_name") is None:
        return asking({"user_name": ask_name("What is your name?", "name")})
    return "asked"


# Resources and prompts


@server.resource("test://static-text", mime_type="text/plain", description="A text.")
def static_text() -> str:
    return "This is the content of the static text resource."


@server.resource("test://static-binary", mime_type="image/png", description="An image.")
def static_binary() -> bytes:
    return base64.b64decode(PNG)


@server.resource("test://template/{id}/data", mime_type="application/json", description="One of many.")
def template(id: str) -> str:
    return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


@server.resource("test://watched-resource", mime_type="text/plain", description="One to watch.")
def watched() -> str:
    return "watched"


async def _subscribe(ctx: Any, params: Any) -> types.EmptyResult:
    return types.EmptyResult()


for method, params in (
    ("resources/subscribe", types.SubscribeRequestParams),
    ("resources/unsubscribe", types.UnsubscribeRequestParams),
):
    server._mcp_server.add_request_handler(method, params, _subscribe)  # pyright: ignore[reportPrivateUsage]


@server.prompt
def test_simple_prompt() -> str:
    """Ask nothing."""
    return "This is a simple prompt for testing."


@server.prompt
def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
    """Ask with two arguments."""
    return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"


@server.prompt
def test_prompt_with_embedded_resource(resourceUri: str) -> list[Message]:
    """Ask about a resource."""
    resource = embedded(resourceUri, "text/plain", "Embedded resource content for testing.")
    return [Message(resource), Message("Please process the embedded resource above.")]


@server.prompt
def test_prompt_with_image() -> list[Message]:
    """Ask about an image."""
    return [Message(IMAGE), Message("Please analyze the image above.")]


@server.prompt
async def test_input_required_result_prompt(ctx: Context) -> str | types.InputRequiredResult:
    """Ask before there is a prompt."""
    answer: Any = getattr(said(ctx, "user_context"), "content", None)
    if not isinstance(answer, dict):
        return asking({"user_context": ask_name("What context should the prompt use?", "context")})
    return f"With {answer}"


@server.completion
def complete(ref: Any, argument: Any, context: Any) -> list[str] | None:
    """Complete an argument."""
    return [place for place in ("paris", "park", "party") if place.startswith(argument.value)]
