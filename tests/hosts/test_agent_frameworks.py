"""Agent frameworks use a real hive with a scripted model, each from a virtual environment of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.host_process import host_environment, run_host
from tests.hosts.model_apis import Move, Request
from tests.hosts.scripted_model import Script, scripted_model
from tests.hosts.tap import tapped
from tests.hosts.visit import OWN, Offered, end_visit, missed, row, steps, visit, when_offered

pytestmark = pytest.mark.hosts

SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Framework:
    program: str
    calls: Mapping[str, Mapping[str, Any]]
    turns: int = 1


FRAMEWORKS = {
    # it drops arguments named `session`
    "agent-framework-core": Framework("agent_framework_program.py", steps("sandbox")),
    # it gives a function all arguments as the one named `arguments`, and fixes the tools for a turn
    "semantic-kernel": Framework(
        "semantic_kernel_program.py", {step: given for step, given in steps().items() if step != "call"}, turns=2
    ),
}


def script_for(framework: Framework) -> Script:
    """Return the visit, which ends the first of two turns with the sandbox."""
    whole = visit(framework.calls)

    def script(request: Request) -> Move:
        waits = framework.turns > 1 and request.called("spawn") and not request.called("destroy")
        if waits and not request.offered(OWN):
            return Move(text="I have a sandbox.")
        return whole(request)

    return script


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.timeout(200)
def test_a_framework_spawns_uses_and_destroys_a_sandbox(
    name: str, hive_url: str, hosts_folder: Path, tmp_path: Path, table: list[tuple[str, ...]]
) -> None:
    began = time.monotonic()
    framework, folder = FRAMEWORKS[name], hosts_folder / "frameworks" / name / "bin"
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    with ExitStack() as stack:
        model = stack.enter_context(scripted_model(script_for(framework)))
        tap = stack.enter_context(tapped(hive_url))
        stack.callback(end_visit, hive_url)
        env = host_environment(home=home, hosts_bin=folder, proxy=model.url)
        command = [
            str(folder / "python"),
            str(Path(__file__).with_name(framework.program)),
            f"{model.url}/v1",
            tap.url,
        ]
        output = run_host(command, env=env, cwd=work, seconds=SECONDS)
        left = end_visit(hive_url)
    assert model.requests, output
    offered = when_offered(model.requests)
    table.append((*row(name, "http", tap.versions, model.requests), f"{time.monotonic() - began:.0f}"))
    assert missed(model.requests[-1], framework.calls, offered) == {}, output
    assert offered is not Offered.NEVER or "call" in framework.calls, output
    assert left == []
