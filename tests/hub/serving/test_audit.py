"""The audit and what is taken out of every line that is written."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Generator
from pathlib import Path
from typing import Any

import jwt
import pytest

from ash_hub.serving import logs
from ash_hub.serving.audit import AUDIT_LOGGER, Audit, AuditedAdmission
from ash_hub.serving.redaction import redacted
from ash_mcp.errors import PermissionDenied, SandboxNotFound, Unauthenticated
from ash_mcp.types import DEFAULT_SCOPE, Principal
from ash_router.admission.api_keys import KeyFile
from ash_router.admission.base import Admitted, Head, Refusal
from tests.hub.serving.held_locks import held, locks_of
from tests.hub.world import World

pytestmark = pytest.mark.anyio

CALLER = Admitted(Principal("ann"), DEFAULT_SCOPE, "/mcp", by="key:abc", client="192.0.2.7:5555")
HEAD = Head("POST", b"/mcp?scope=x", [], ("192.0.2.7", 5555))


@pytest.fixture
def folder(tmp_path: Path) -> Generator[Path]:
    root, audit = logging.getLogger(), logging.getLogger(AUDIT_LOGGER)
    before = (root.handlers[:], root.level, audit.handlers[:], audit.propagate, audit.level)
    # pytest's own handlers stay out of it: setting up closes what is there
    root.handlers = []
    logs.set_up(tmp_path, "info", to_stderr=False)
    yield tmp_path
    for handler in (*root.handlers, *audit.handlers):
        handler.close()
    root.handlers, audit.handlers, audit.propagate = before[0], before[2], before[3]
    root.setLevel(before[1])
    audit.setLevel(before[4])


def written(folder: Path, name: str) -> str:
    for handler in (*logging.getLogger().handlers, *logging.getLogger(AUDIT_LOGGER).handlers):
        handler.flush()
    return (folder / name).read_text()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(folder, "audit.log").splitlines()]


class Fixed:
    """An admission that says one thing, at once or later."""

    def __init__(self, verdict: Admitted | Refusal, *, later: bool) -> None:
        self._verdict = verdict
        self._is_late = later

    def admit(self, head: Head) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        return self._later() if self._is_late else self._verdict

    async def _later(self) -> Admitted | Refusal:
        return self._verdict


@pytest.mark.parametrize("later", [False, True])
async def test_a_request_that_is_kept_out_leaves_one_line(folder: Path, later: bool) -> None:
    refusal = Refusal(Unauthenticated("who are you"))
    verdict = AuditedAdmission(Fixed(refusal, later=later), Audit()).admit(HEAD)
    assert (await verdict if isinstance(verdict, Awaitable) else verdict) is refusal
    (line,) = lines(folder)
    assert line.pop("at").endswith("Z")
    assert line == {
        "event": "admission",
        "outcome": "unauthenticated",
        "from": "192.0.2.7:5555",
        "what": "POST /mcp",
        "why": "who are you",
    }


@pytest.mark.parametrize("later", [False, True])
async def test_a_request_that_comes_in_leaves_none(folder: Path, later: bool) -> None:
    verdict = AuditedAdmission(Fixed(CALLER, later=later), Audit()).admit(HEAD)
    assert (await verdict if isinstance(verdict, Awaitable) else verdict) is CALLER
    assert lines(folder) == []


def test_a_refused_caller_is_named_with_credential_and_address(folder: Path) -> None:
    Audit().refused(CALLER, "extend", SandboxNotFound("none of that name"))
    (line,) = lines(folder)
    assert (line["who"], line["by"], line["from"]) == ("ann", "key:abc", "192.0.2.7:5555")
    assert (line["event"], line["what"], line["outcome"]) == ("request", "extend", "sandbox_not_found")


def test_a_flood_of_refusals_is_counted_and_pushes_nothing_out(folder: Path) -> None:
    now = 1000.0
    audit = Audit(lambda: now)
    for _ in range(500):
        audit.refused(CALLER, "extend", PermissionDenied("no"))
    now += 1
    audit.refused(CALLER, "extend", PermissionDenied("no"))
    told = lines(folder)
    assert len(told) == 21
    assert told[-1]["left_out_before"] == 480


def test_no_line_can_be_forged_by_what_a_caller_sends(folder: Path) -> None:
    head = Head("POST", b'/mcp"}\n{"event": "spawn', [], None)
    Audit().kept_out(head, Refusal(Unauthenticated('no\n{"event": "spawn"}')))
    assert [line["event"] for line in lines(folder)] == ["admission"]


def test_the_audit_is_not_in_the_log_of_the_hive(folder: Path) -> None:
    Audit().refused(CALLER, "extend", PermissionDenied("no"))
    logging.getLogger("ash.hub").info("something else")
    assert "something else" in written(folder, "hive.log")
    assert "ash.audit" not in written(folder, "hive.log")


async def test_a_hive_serves_on_while_a_process_that_was_stopped_holds_its_logs(folder: Path, world: World) -> None:
    with held(*locks_of(folder)):
        sandbox = await world.spawn()
        Audit().refused(CALLER, "extend", PermissionDenied("no"))
        await world.sandboxes.destroy([sandbox])
        assert not (folder / "hive.log").read_text() and not (folder / "audit.log").read_text()
    assert re.findall(r"(spawned|ended) sandbox=", written(folder, "hive.log")) == ["spawned", "ended"]
    assert len(lines(folder)) == 1


def secrets_of(tmp_path: Path) -> list[str]:
    _, key = KeyFile(tmp_path / "k" / "keys.json").add()
    token = jwt.encode({"sub": "ann", "exp": 99999999999}, "x" * 32, algorithm="HS256")
    return [key, token, "opaque-token-of-a-proxy"]


def test_no_credential_gets_into_a_log_by_any_way(folder: Path, tmp_path: Path) -> None:
    log = logging.getLogger("ash.hub")
    known = secrets_of(tmp_path)
    for secret in known:
        header = f"Bearer {secret}"
        log.warning("headers %s and %r", {"authorization": header}, header.encode())
        log.warning("extra", extra={"authorization": header})
        try:
            raise ValueError(header)
        except ValueError:
            log.exception("raised")
        Audit().refused(CALLER, header, PermissionDenied(header))
    both = "".join(written(folder, name) for name in ("hive.log", "audit.log"))
    for secret in known:
        assert secret.split("_")[-1].split(".")[-1] not in both
    assert both.count("[redacted]") >= 12


@pytest.mark.parametrize(
    "text",
    [
        "sandbox=sbx-ty4zwnhviwilwitybae7c6pt",
        "it is the bearer",
        "ash_file_read ash_job_start",
        "a.b.c",
        "",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted(text) == text


def test_a_redacted_key_can_still_be_found_and_revoked(tmp_path: Path) -> None:
    made, text = KeyFile(tmp_path / "keys.json").add()
    assert redacted(f"got {text}!") == f"got ash_{made.id}_[redacted]!"


def test_passwords_in_urls_are_redacted() -> None:
    assert redacted("redis://me:hunter2@host/0") == "redis://me:[redacted]@host/0"
