"""Real, unmodified hosts use a real hive, without a model: what comes of it, and when sandboxes' tools appear."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ash_mcp.sync import Hive
from tests.hosts.cold_hive import cold_hive
from tests.hosts.host_process import host_environment, run_host
from tests.hosts.hosts import ASH_PROGRAM, HOSTS, Place
from tests.hosts.scripted_model import ScriptedModel, scripted_model
from tests.hosts.tap import tapped
from tests.hosts.visit import Offered, end_visit, missed, row, steps, visit, when_offered

pytestmark = pytest.mark.hosts

HOST_SECONDS = 90.0
TOLD = "whoami"
"""A tool whose name every host leaves as it is."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Of one host, as it is today."""

    protocol: str
    offered: Offered
    """At least; sooner is better."""


FORMS = ("http", "stdio", "cold")
"""Cold: over stdio, and the host's bridge starts the hive."""

TODAY = {
    "claude-code": Expected("2026-07-28", Offered.AT_ONCE),
    "codex": Expected("2025-06-18", Offered.NEVER),
    "gemini-cli": Expected("2025-06-18", Offered.AT_ONCE),
    "opencode": Expected("2025-11-25", Offered.AT_ONCE),
    "copilot": Expected("2026-07-28", Offered.AT_ONCE),
    "qwen-code": Expected("2025-11-25", Offered.NEVER),
    "cline": Expected("2025-11-25", Offered.NEVER),
    "continue": Expected("2025-11-25", Offered.NEVER),
}
OVER_STDIO = {"cline": "2024-11-05"}
"""The protocol of hosts that speak another one there."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("host", TODAY)
@pytest.mark.timeout(300)
def test_a_host_spawns_uses_and_destroys_a_sandbox(
    host: str,
    form: str,
    request: pytest.FixtureRequest,
    hosts_folder: Path,
    tmp_path: Path,
    table: list[tuple[str, ...]],
) -> None:
    began = time.monotonic()
    with ExitStack() as stack:
        model = stack.enter_context(scripted_model(visit(steps())))
        versions: list[str] = []
        if form == "cold":
            hive = stack.enter_context(cold_hive(str(ASH_PROGRAM)))
            output = _run(host, hosts_folder / "node_modules/.bin", _place(tmp_path, model, "", "stdio", hive.program))
            assert hive.url is not None, output
            left = end_visit(hive.url)
        else:
            hive_url: str = request.getfixturevalue("hive_url")
            tap = stack.enter_context(tapped(hive_url))
            stack.callback(end_visit, hive_url)  # what a host leaves would hold the session's name
            output = _run(host, hosts_folder / "node_modules/.bin", _place(tmp_path, model, tap.url, form))
            left, versions = end_visit(hive_url), tap.versions
    expected = TODAY[host]
    seen = [asked for asked in model.requests if asked.offered("spawn")]
    assert seen, output
    offered = when_offered(seen)
    table.append((*row(host, form, versions, model.requests), f"{time.monotonic() - began:.0f}"))
    assert missed(seen[-1], steps(), offered) == {}, output
    assert left == []
    assert model.requests[0].offered("spawn"), "the model's first request lacks the hive's own tools"
    assert offered >= expected.offered
    if form != "cold":
        assert versions[-1:] == [OVER_STDIO.get(host, expected.protocol) if form == "stdio" else expected.protocol]
    assert model.looked_for_outside() == []


@pytest.mark.parametrize("host", TODAY)
@pytest.mark.timeout(300)
def test_a_host_uses_a_sandbox_that_is_shared_with_it(
    host: str, hive_url: str, hosts_folder: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        hive = stack.enter_context(Hive(hive_url))
        box = stack.enter_context(hive.spawn("echo", env={"WHO": "a guest"}, share={"tools": [TOLD]}))
        assert box.spawn_share is not None
        model = stack.enter_context(scripted_model(visit({TOLD: {}})))
        place = replace(_place(tmp_path, model, box.spawn_share.url, "http"), token=box.spawn_share.token)
        output = _run(host, hosts_folder / "node_modules/.bin", place)
        seen = [asked for asked in model.requests if asked.offered(TOLD)]
        assert seen, output
        assert "a guest" in (seen[-1].result(TOLD) or ""), output
        assert not any(asked.offered("spawn") for asked in model.requests)


def _place(folder: Path, model: ScriptedModel, hive_url: str, form: str, program: Path | None = None) -> Place:
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    return Place(home=home, work=work, model_url=model.url, hive_url=hive_url, form=form, program=program)


def _run(host: str, hosts_bin: Path, place: Place) -> str:
    start = HOSTS[host](place)
    env = {**host_environment(home=place.home, hosts_bin=hosts_bin, proxy=place.model_url), **start.env}
    env |= {"ASH_TOKEN": place.token} if place.token else {}
    for command in start.first:
        run_host(command, env=env, cwd=place.work, seconds=HOST_SECONDS)
    return run_host(start.command, env=env, cwd=place.work, seconds=HOST_SECONDS)
