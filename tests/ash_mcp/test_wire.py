"""The vocabulary on the wire: what is written is read again, and one table holds every kind of error."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_mcp import errors, wire
from ash_mcp.errors import AshError
from ash_mcp.types import (
    Cause,
    Endpoint,
    EndReason,
    SandboxId,
    SandboxInfo,
    Scope,
    SessionName,
    State,
    new_sandbox_id,
    valid_scope,
    valid_session_name,
)

CLASSES: list[type[AshError]] = [getattr(errors, name) for name in errors.__all__]

moments = st.integers(0, 4_000_000_000_000).map(lambda ms: ms / 1000)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
infos = st.builds(
    SandboxInfo,
    id=texts.map(SandboxId),
    session=texts.map(SessionName),
    scope=texts.map(Scope),
    recipe=texts,
    state=st.sampled_from(State),
    created_at=moments,
    ready_at=st.none() | moments,
    expires_at=moments,
    network=st.sampled_from(["none", "internet", ("pypi.org", "*.pypi.org")]),
    idle_seconds=st.none() | st.floats(0, 1e6),
    last_call_at=st.none() | moments,
    ended_at=st.none() | moments,
    reason=st.none() | st.sampled_from(EndReason),
    cause=st.none() | st.sampled_from(Cause),
    message=st.none() | texts,
    labels=st.dictionaries(texts, texts, max_size=3),
    warnings=st.lists(texts, max_size=3).map(tuple),
)

INFO = SandboxInfo(
    id=SandboxId("sbx-1"),
    session=SessionName("sb1"),
    scope=Scope(""),
    recipe="general",
    state=State.READY,
    created_at=10.0,
    expires_at=20.0,
)


@given(infos)
def test_sandbox_comes_back_from_json_as_it_was(info: SandboxInfo):
    shape = json.loads(json.dumps(wire.info_to_json(info, now=5e9)))
    back = wire.info_from_json(shape)
    close = {
        name: pytest.approx(getattr(info, name), abs=0.002)
        for name in ("created_at", "ready_at", "expires_at", "last_call_at", "ended_at")
        if getattr(info, name) is not None
    }
    assert dataclasses.asdict(back) == {**dataclasses.asdict(info), **close}


def test_age_stops_at_the_end_and_is_never_negative():
    assert wire.info_to_json(INFO, now=15.9)["age_seconds"] == 5
    assert wire.info_to_json(INFO, now=5)["age_seconds"] == 0
    ended = dataclasses.replace(INFO, state=State.GONE, ended_at=12.0)
    assert wire.info_to_json(ended, now=99)["age_seconds"] == 2


@pytest.mark.parametrize(
    "change",
    [{"status": "dancing"}, {"reason": "boredom"}, {"created_at": "yesterday"}, {"session": None, "sandbox_id": ...}],
    ids=str,
)
def test_sandbox_described_in_an_unknown_way_is_a_fault_of_the_other_side(change: dict[str, Any]):
    shape = {**wire.info_to_json(INFO, now=0), **change}
    with pytest.raises(errors.RemoteProtocolError):
        wire.info_from_json({name: value for name, value in shape.items() if value is not ...})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("retryable", [None, True, False])
def test_every_failure_comes_back_as_it_was(cls: type[AshError], retryable: bool | None):
    error = cls("what to do", retryable=retryable, step="unpack", retry_after_seconds=3)
    shape = json.loads(json.dumps(wire.failure_to_json(error)))
    back = wire.failure_from_json(shape)
    assert type(back) is cls
    assert (back.message, back.retryable, back.trainable, back.data) == (
        error.message,
        error.retryable,
        error.trainable,
        error.data,
    )


def test_kinds_are_unique_and_every_class_is_exported():
    kinds = [cls.kind for cls in CLASSES]
    assert len(set(kinds)) == len(kinds)

    def below(cls: type[AshError]) -> set[type[AshError]]:
        return {cls}.union(*(below(child) for child in cls.__subclasses__() if child.__module__ == errors.__name__))

    assert below(AshError) == set(CLASSES)


def test_tree_in_the_docstring_names_every_class():
    assert errors.__doc__ is not None
    for cls in CLASSES:
        assert cls.__name__ in errors.__doc__


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_kind_has_codes_that_are_not_mcps_own(cls: type[AshError]):
    error = cls("x")
    assert 400 <= wire.http_status(error) < 600
    assert not -32042 <= wire.jsonrpc_code(error) <= -32020


def test_codes_of_a_kind_are_its_nearest_ancestors():
    assert wire.http_status(errors.SandboxNotFound("x")) == 404
    assert wire.http_status(errors.FileNotFound("x")) == wire.http_status(errors.SandboxRefused("x")) == 422
    assert wire.http_status(errors.Unauthenticated("x")) == 401


@pytest.mark.parametrize(
    "shape",
    [
        {"kind": "from_the_future", "message": "new", "retryable": True, "trainable": False},
        {"message": "new", "retryable": True},
        {"kind": None, "message": "new", "retryable": True, "data": []},
    ],
    ids=str,
)
def test_unknown_kind_keeps_its_words(shape: Any):
    back = wire.failure_from_json(shape)
    assert type(back) is AshError
    assert (back.message, back.retryable, back.trainable) == ("new", True, False)


def test_what_is_no_failure_at_all_is_a_fault_of_the_other_side():
    shapes: list[Any] = [None, [], "kind", 3]
    for shape in shapes:
        assert isinstance(wire.failure_from_json(shape), errors.RemoteProtocolError)


def test_data_cannot_take_the_place_of_fields_nor_truthy_words_that_of_true():
    shape = {
        "kind": "command_failed",
        "message": "real",
        "retryable": "yes",
        "data": {"message": "fake", "self": 1, "result": 2, "retryable": True, "step": "kept"},
    }
    back = wire.failure_from_json(shape)
    assert (back.message, back.retryable, dict(back.data)) == ("real", False, {"step": "kept"})


def test_tool_failure_is_for_models_and_for_programs():
    shape = wire.tool_failure(errors.SandboxGone("it ended", reason="destroyed"), nonce="n")
    assert shape["isError"] and shape["content"] == [{"type": "text", "text": "it ended"}]
    assert shape["_meta"]["ash-nonce"] == "n"
    back = wire.failure_from_json(shape["_meta"][wire.FAILURE_META_KEY])
    assert isinstance(back, errors.SandboxGone) and back.data["reason"] == "destroyed"
    assert "ash-nonce" not in wire.tool_failure(errors.SandboxGone("it ended"))["_meta"]


SAID_INSIDE = "a sandbox that worked said so itself"
TRAINABLE_BECAUSE: dict[type[AshError], str] = {
    errors.SandboxRefused: SAID_INSIDE,
    errors.BadArguments: SAID_INSIDE,
    errors.JobNotFound: SAID_INSIDE,
    errors.PtyNotFound: SAID_INSIDE,
    errors.ResultLost: SAID_INSIDE,
    errors.CommandNotStarted: SAID_INSIDE,
    errors.FileError: SAID_INSIDE,
    errors.FileNotFound: SAID_INSIDE,
    errors.FileExists: SAID_INSIDE,
    errors.IsADirectory: SAID_INSIDE,
    errors.NotADirectory: SAID_INSIDE,
    errors.FileNotPermitted: SAID_INSIDE,
    errors.NoSpace: SAID_INSIDE,
    errors.CommandFailed: "a command ran in it, and ended so",
}
NOT_BECAUSE: dict[type[AshError], str] = {
    AshError: "who is to blame is not known",
    errors.ConfigError: "configuration, of the hive or of its client",
    errors.RequestRefused: "the hive said no, and no sandbox was asked",
    errors.NotFound: "a wrong path, or something that was lost",
    errors.SandboxNotFound: "it may have been lost while no hive ran",
    errors.RecipeNotFound: "configuration of the hive",
    errors.SnapshotNotFound: "what the hive has, not what an agent did",
    errors.RunNotFound: "no sandbox was asked",
    errors.ToolNotFound: "no sandbox was asked",
    errors.Conflict: "two of the hive's callers want one thing",
    errors.RunTaken: "two of the hive's callers want one name",
    errors.RunEnded: "whoever held the run was away for too long",
    errors.SessionTaken: "two of the hive's callers want one thing",
    errors.CapacityExceeded: "a quota",
    errors.PermissionDenied: "credentials",
    errors.Unauthenticated: "credentials",
    errors.PortNotAllowed: "its spawn did not ask for it",
    errors.Unsupported: "configuration of the hive",
    errors.SandboxError: "the sandbox did not work",
    errors.StartFailed: "the sandbox did not work",
    errors.SandboxGone: "a lost sandbox",
    errors.PortClosed: "who asks came too early, or the server ended",
    errors.SandboxReset: "who reset it has ended the call",
    errors.TransportError: "an outage",
    errors.ConnectFailed: "an outage, or a wrong URL",
    errors.AshTimeout: "an outage, or a slow hive",
    errors.StreamBroken: "an outage",
    errors.ProtocolError: "a defect, or what answers is no hive",
    errors.LocalProtocolError: "a defect",
    errors.RemoteProtocolError: "a defect, or what answers is no hive",
    errors.HiveFault: "a defect",
}


def test_each_class_says_for_a_reason_whether_a_trainer_may_learn_from_it():
    assert {*TRAINABLE_BECAUSE, *NOT_BECAUSE} == set(CLASSES) and not TRAINABLE_BECAUSE.keys() & NOT_BECAUSE.keys()
    for cls in CLASSES:
        error = cls("x")
        assert error.trainable is (cls in TRAINABLE_BECAUSE), cls
        assert not (error.trainable and error.retryable)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("claimed", [True, False, None, "yes"])
def test_what_a_failure_claims_of_itself_makes_no_difference(cls: type[AshError], claimed: Any):
    shape = {**wire.failure_to_json(cls("x")), "trainable": claimed}
    assert wire.failure_from_json(shape).trainable is (cls in TRAINABLE_BECAUSE)


def test_a_kind_that_is_not_known_is_nobodys_to_learn_from():
    assert not wire.failure_from_json({"kind": "from_the_future", "message": "new", "trainable": True}).trainable


def test_timeouts_are_builtin_ones():
    assert issubclass(errors.AshTimeout, TimeoutError)


def test_sandbox_ids_are_unguessable_in_length_and_alphabet():
    ids = {new_sandbox_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(name) == 28 and set(name[4:]) <= set("abcdefghijklmnopqrstuvwxyz234567") for name in ids)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("sb1", True),
        ("a" * 16, True),
        *((bad, False) for bad in ("a" * 17, "", "1a", "a_b", "A", "spawn", "list", "sb1\n", "é")),
    ],
)
def test_session_names_are_short_and_never_the_hives_own(name: str, good: bool):
    assert valid_session_name(name) is good


@pytest.mark.parametrize(
    ("name", "good"), [("run42", True), ("a.b-c_D", True), ("", False), ("*", False), ("-a", False), ("a/b", False)]
)
def test_scopes_are_names_that_fit_in_a_path(name: str, good: bool):
    assert valid_scope(name) is good


def test_endpoint_is_a_socket_or_an_address():
    Endpoint(unix="/run/s")
    Endpoint(host="::1", port=1)
    wrong: list[dict[str, Any]] = [{}, {"host": "::1"}, {"unix": "/run/s", "host": "::1", "port": 1}]
    for bad in wrong:
        with pytest.raises(ValueError, match="either"):
            Endpoint(**bad)


def test_states_that_have_ended_are_two():
    assert {state for state in State if state.ended} == {State.GONE, State.FAILED}
