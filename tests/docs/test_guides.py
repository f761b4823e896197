"""What the guides of docs/deploy say that CI runs, run on a cluster. Needs the images localhost/ash/*:dev."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import pytest
import yaml

from tests.docs.pages import GUIDES, ROOT, RUN, commands, files
from tests.helm.chart import helm
from tests.helm.cluster import done, kubectl, on_one_node
from tests.stand_ins import add_tool

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(420)]

SECONDS: Final = 300
WAIT: Final = """
if [ -n "${ASH_URL:-}" ]; then
  for _ in $(seq 60); do ash list >/dev/null 2>&1 && break; sleep 0.25; done
fi
"""
"""After each block: a reader is slower than a port-forward, and than a hub that hears of a new key."""


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"guide-{secrets.token_hex(4)}"
    done("get", "namespace", "default")
    try:
        yield name
    finally:
        config = os.environ["ASH_TEST_KUBECONFIG"]
        helm("uninstall", "ash", "--namespace", name, "--no-hooks", "--ignore-not-found", "--kubeconfig", config)
        kubectl("delete", "namespace", name, f"{name}-sandboxes", "--ignore-not-found", "--wait=false")


def without_selectors(value: Any) -> Any:
    """Leave out what selects nodes that only a cloud has."""
    if not isinstance(value, Mapping):
        return value
    given = cast("Mapping[str, Any]", value)
    return {key: without_selectors(it) for key, it in given.items() if key not in ("nodeSelector", "node_selector")}


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def adapted(script: str, namespace: str) -> str:
    script = re.sub(r"\bash-sandboxes\b", f"{namespace}-sandboxes", script)
    script = re.sub(r"(--namespace|-n|namespace) ash\b", rf"\1 {namespace}", script)
    for port in ("8420", "8421"):
        script = re.sub(rf"\b{port}(?=:80\b|/mcp)", free_port(), script)
    return script


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_what_a_guide_says_is_run_runs(guide: Path, namespace: str, tmp_path: Path) -> None:
    for name, value in files(guide).items():
        (tmp_path / name).write_text(yaml.safe_dump(without_selectors(value)))
    (tmp_path / "helm").symlink_to(ROOT / "helm")
    (tmp_path / "overlay.yaml").write_text(json.dumps(on_one_node(namespace)))
    programs = tmp_path / "bin"
    programs.mkdir()
    real = os.environ.get("ASH_TEST_HELM") or shutil.which("helm")
    if real is None:
        pytest.skip("helm is not installed: put it on the PATH, or name it in ASH_TEST_HELM")
    add_tool(
        programs, "helm", f'more=()\n[ $1 != upgrade ] || more=(--values overlay.yaml)\n{real} "$@" "${{more[@]}}"'
    )
    script = adapted(WAIT.join(commands(guide, RUN)), namespace)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ASH_")},
        "KUBECONFIG": os.environ["ASH_TEST_KUBECONFIG"],
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
    }
    code, said = run(["bash", "-euxo", "pipefail", "-c", script], tmp_path, environment)
    assert code == 0, re.sub(r"ash_\w{20,}", "ash_…", said)[-4000:]
    assert not kubectl("get", "pods", "--namespace", f"{namespace}-sandboxes", "--output", "name").stdout


def run(command: list[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command and return its exit code and all that it said; what it left in the background ends, too."""
    with (folder / "said").open("w+") as said:
        with subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        ) as process:
            try:
                code = process.wait(SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        return code, said.read()
