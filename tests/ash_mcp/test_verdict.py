"""Which error an answer means: each rule with the answers on either side of it."""

from __future__ import annotations

from typing import Any

import pytest

from ash_mcp._verdict import Head, error_of_message, error_of_status, is_result_lost, misbehaviour
from ash_mcp.errors import (
    AshError,
    ConfigError,
    HiveFault,
    RemoteProtocolError,
    SandboxGone,
    SandboxRefused,
    TransportError,
    Unauthenticated,
    Unsupported,
)
from ash_mcp.wire import FAILURE_META_KEY, HEADER_NONCE, failure_to_json, tool_failure

JSON, STREAM = "application/json", "text/event-stream"
GONE = SandboxGone("gone", reason="destroyed")
FAILURE = failure_to_json(GONE)


def head(origin: str | None, content_type: str = JSON, nonce: str | None = None, status: int = 200) -> Head:
    return Head(status, content_type, origin, nonce)


def of_result(answered: Head, result: dict[str, Any]) -> type[AshError] | None:
    error = error_of_message(answered, {"result": result})
    return None if error is None else type(error)


@pytest.mark.parametrize(
    ("answered", "nonce", "cls"),
    [
        (head("hub"), None, SandboxGone),
        (head("sandbox", STREAM, "n1"), "n1", SandboxGone),
        (head("sandbox", STREAM, "n1"), "n2", None),
        (head("sandbox", STREAM, "n1"), None, None),
        (head("sandbox", STREAM), "n1", None),
        (head("sandbox", STREAM), None, None),
        (head("sandbox", JSON, "n1"), "n1", None),
        (head(None, JSON, "n1"), "n1", None),
    ],
    ids=str,
)
def test_failure_is_typed_from_the_hive_or_with_the_nonce_of_a_streams_head(
    answered: Head, nonce: str | None, cls: type[AshError] | None
):
    assert of_result(answered, tool_failure(GONE, nonce=nonce)) is cls


def test_result_is_a_failure_only_with_both_its_marks():
    meta = {FAILURE_META_KEY: FAILURE}
    assert of_result(head("hub"), {"isError": False, "_meta": meta}) is None
    assert of_result(head("hub"), {"isError": 1, "_meta": meta}) is None
    assert of_result(head("hub"), {"isError": True}) is None
    assert of_result(head("hub"), {"isError": True, "_meta": {HEADER_NONCE: "n1"}}) is None
    assert of_result(head("sandbox", STREAM, "n1"), {"isError": True, "_meta": {**meta, HEADER_NONCE: 1}}) is None


def test_question_to_the_caller_is_unsupported_and_a_complete_result_is_none():
    assert of_result(head("sandbox"), {"resultType": "input_required"}) is Unsupported
    assert of_result(head("sandbox"), {"resultType": "complete"}) is None


@pytest.mark.parametrize(
    ("origin", "error", "cls"),
    [
        ("hub", {"code": -32601, "message": "no such method"}, Unsupported),
        ("hub", {"code": -32602, "message": "bad"}, ConfigError),
        ("hub", {"code": -32603, "message": "broken"}, HiveFault),
        ("hub", {"code": -32603, "data": FAILURE}, SandboxGone),
        ("hub", {"code": -32603, "data": {FAILURE_META_KEY: FAILURE}}, SandboxGone),
        ("hub", {"code": -32603, "message": "broken", "data": {"other": 1}}, HiveFault),
        ("hub", None, RemoteProtocolError),
        ("sandbox", {"code": -32601, "message": "no"}, SandboxRefused),
        ("sandbox", {"code": -32603, "data": FAILURE}, SandboxRefused),
        ("sandbox", None, SandboxRefused),
        (None, {"code": -32603, "data": FAILURE}, RemoteProtocolError),
        (None, None, RemoteProtocolError),
    ],
    ids=str,
)
def test_rpc_error_is_typed_by_its_sender_its_data_and_its_code(
    origin: str | None, error: dict[str, Any] | None, cls: type[AshError]
):
    found = error_of_message(head(origin), {} if error is None else {"error": error})
    assert found is not None and type(found) is cls
    assert found.message


def test_sandboxs_rpc_error_keeps_its_words_and_its_code():
    error = error_of_message(head("sandbox"), {"error": {"code": 7, "message": "mine"}})
    assert error is not None and (error.message, error.data) == ("mine", {"code": 7})


ANSWER: dict[str, Any] = {"jsonrpc": "2.0", "result": {}}
REFUSAL: dict[str, Any] = {"jsonrpc": "2.0", "error": {"code": 1, "message": "no"}}


@pytest.mark.parametrize(
    ("answered", "body", "cls"),
    [
        (head("hub", status=410), {"error": FAILURE}, SandboxGone),
        (head("sandbox", status=410), {"error": FAILURE}, SandboxRefused),
        (head(None, status=410), {"error": FAILURE}, RemoteProtocolError),
        (head("hub", status=500), {"error": {"message": "untyped"}}, RemoteProtocolError),
        (head("hub"), ANSWER, None),
        (head("hub"), REFUSAL, None),
        (head("hub", status=400), REFUSAL, None),
        (head("hub"), {"jsonrpc": "2.0"}, RemoteProtocolError),
        (head("hub"), {"jsonrpc": "1.0", "result": {}}, RemoteProtocolError),
        (head("hub"), {"result": {}}, RemoteProtocolError),
        (head("hub"), None, RemoteProtocolError),
        (head("sandbox"), None, SandboxRefused),
        (head("sandbox", status=503), None, SandboxRefused),
        (head(None, status=502), None, TransportError),
        (head(None, status=503), None, TransportError),
        (head(None, status=504), None, TransportError),
        (head(None, status=500), None, RemoteProtocolError),
        (head(None, status=401), None, Unauthenticated),
        (head(None, status=403), None, Unauthenticated),
        (head(None, status=404), None, RemoteProtocolError),
        (head(None, status=300), None, RemoteProtocolError),
    ],
    ids=str,
)
def test_whole_body_is_typed_by_its_sender_its_shape_and_its_status(
    answered: Head, body: dict[str, Any] | None, cls: type[AshError] | None
):
    found = error_of_status(answered, body)
    assert (None if found is None else type(found)) is cls


def test_success_without_an_answer_is_the_hives_fault_and_a_redirect_a_wrong_url():
    success, redirect = error_of_status(head(None, status=299), None), error_of_status(head(None, status=300), None)
    assert success is not None and "the hive answered 299" in success.message
    assert redirect is not None and "check ASH_URL" in redirect.message and redirect.data == {"status": 300}


@pytest.mark.parametrize(
    ("origin", "is_error", "kind", "abandoned"),
    [
        ("sandbox", True, "abandoned", True),
        ("sandbox", True, "job_not_found", True),
        ("sandbox", True, "result_lost", True),
        ("sandbox", True, "file_not_found", False),
        ("sandbox", False, "abandoned", False),
        ("hub", True, "abandoned", False),
    ],
)
def test_abandoned_is_what_a_sandbox_says_of_a_call_that_failed(
    origin: str, is_error: bool, kind: str, abandoned: bool
):
    result = {"isError": is_error, "structuredContent": {"error": {"kind": kind}}}
    assert is_result_lost(head(origin), result) is abandoned


def test_what_makes_no_sense_is_the_doing_of_the_one_that_sent_it():
    assert type(misbehaviour(head("sandbox"), "went on")) is SandboxRefused
    assert type(misbehaviour(head("hub"), "went on")) is RemoteProtocolError


def test_head_reads_its_headers_and_takes_an_empty_nonce_for_none():
    found = Head.of(200, {"content-type": "Text/Event-Stream; charset=utf-8", "ash-origin": "hub", "ash-nonce": ""})
    assert found == Head(200, STREAM, "hub", None)
    assert found.is_stream and found.from_hub and not found.from_sandbox
