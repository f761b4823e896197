"""What the runner is told, on whichever backend: the contract of `docs/runner.md`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ash_hub
from ash_hub.backends.runner import RUNNER_ARGUMENTS, runner_config, runner_environment, runner_image
from ash_mcp.types import SandboxId, SandboxSpec

SPEC = SandboxSpec(id=SandboxId("sbx-x"), recipe="general", server={"python": "m:o"}, env={"A": "b"}, public_key="key")
CONTRACT = (Path(ash_hub.__file__).parents[2] / "docs" / "runner.md").read_text()


def test_the_configuration_has_what_the_contract_names_and_nothing_else() -> None:
    spec = replace(SPEC, network_note="why", result_bytes=1)
    config = runner_config(spec, workspace="/w", home="/h", egress="/e/proxy.sock", canary="10.0.0.1:8420")
    config["image"] = runner_image({}, "", has_workdir=False)  # the local backend adds it
    line = next(line for line in CONTRACT.splitlines() if line.startswith("| `ASH_RUNNER_CONFIG`"))
    assert set(config) == {word.strip('"?') for word in line[line.index("{") + 1 : line.index("}")].split(", ")}
    assert config["workspace"] == "/w" and config["home"] == "/h" and config["egress"] == "/e/proxy.sock"
    assert config["network_note"] == "why" and config["canary"] == "10.0.0.1:8420"
    assert not {"egress", "canary", "network_note"} & runner_config(SPEC, workspace="/w", home="/h").keys()


def test_a_pod_s_runner_listens_on_a_port_and_a_local_one_on_a_descriptor() -> None:
    config = runner_config(SPEC, workspace="/w", home="/h")
    pod, local = runner_environment(config, listen="0.0.0.0:8080"), runner_environment(config, listen_descriptor="7")
    assert pod["ASH_LISTEN"] == "0.0.0.0:8080" and "ASH_LISTEN_FD" not in pod
    assert local["ASH_LISTEN_FD"] == "7" and "ASH_LISTEN" not in local
    assert json.loads(pod["ASH_RUNNER_CONFIG"]) == config and pod["HOME"] == "/h"
    assert all(f"| `{name}` |" in CONTRACT for name in (*pod, *local) if name.startswith("ASH_"))


def test_the_runner_is_a_module_that_no_path_of_the_sandbox_shadows() -> None:
    assert RUNNER_ARGUMENTS == ("-P", "-s", "-m", "ash_recipes.runner")
