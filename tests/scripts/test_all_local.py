"""`make all-local`, with stand-ins for minikube and kind; no local cluster is made."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.chart import helm
from tests.helm.cluster import done, kubectl, on_one_node
from tests.stand_ins import ROOT, add_tool, run, tools_in

RECORD = 'echo "$(basename "$0") $*" >> "$CALLS"; '
NO_KEYS = '{"keys": []}'


class Machine:
    """A PATH whose programs write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.path = tools_in(folder / "bin")
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._calls = folder / "calls"
        for name in ("docker", "helm", "kubectl"):
            self.add(name)

    def add(self, name: str, script: str = "") -> None:
        add_tool(self.path, name, RECORD + script)

    def has_hive(self, *, release: bool, keys: str) -> None:
        self.add("helm", f"[ $1 != status ] || exit {0 if release else 1}")
        self.add("kubectl", f'case "$*" in *"key list"*) echo \'{keys}\' ;; *"key new"*) echo ash_secret ;; esac')

    def all_local(self, *arguments: str, **env: str) -> tuple[int, str, str]:
        given = {"CALLS": str(self._calls), "TMPDIR": str(self.temporary), **env}
        done = run("scripts/all-local", *arguments, path=self.path, **given)
        return done.returncode, done.stdout, done.stderr

    def calls(self) -> list[str]:
        found = self._calls.read_text() if self._calls.exists() else ""
        return re.sub(re.escape(str(self.temporary)) + r"/[^/\s]+", "TMP", found).splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    assert not list(machine.temporary.iterdir()), "archives of images are left"


BUILD = [
    "docker version",
    "docker build --file hub/Dockerfile --tag localhost/ash/hub:dev .",
    "docker save --output TMP/hub.tar localhost/ash/hub:dev",
    "docker build --file recipes/Dockerfile --tag localhost/ash/recipes:dev .",
    "docker save --output TMP/recipes.tar localhost/ash/recipes:dev",
]


def test_a_minikube_is_started_and_gets_images_chart_and_key(machine: Machine) -> None:
    machine.add("minikube", "[ $1 != status ]")
    machine.has_hive(release=False, keys=NO_KEYS)
    code, said, errors = machine.all_local("--set", "hub.replicas=1")
    assert code == 0, errors
    in_hub = "kubectl --context minikube --namespace ash exec deployment/ash-hub -- ash key"
    assert machine.calls() == [
        "minikube status --profile minikube",
        "minikube start --profile minikube --cni calico",
        *BUILD,
        "minikube image load --profile minikube TMP/hub.tar",
        "minikube image load --profile minikube TMP/recipes.tar",
        "helm status ash --kube-context minikube --namespace ash",
        "helm upgrade --install ash helm/ash --kube-context minikube --namespace ash --create-namespace"
        " --wait --timeout 10m --set hub.replicas=1",
        f"{in_hub} list --json",
        f"{in_hub} new --name first",
    ]
    assert "kubectl --context minikube port-forward -n ash svc/ash 8420:80\n" in said
    assert "http://127.0.0.1:8420/mcp\n" in said and "export ASH_TOKEN=ash_secret\n" in said


def test_a_kind_with_a_hive_is_upgraded_and_runs_the_new_images(machine: Machine) -> None:
    machine.add("kind", "[ $1 != get ] || echo ash")
    machine.has_hive(release=True, keys='{"keys": [{"id": "k"}]}')
    code, said, errors = machine.all_local()
    assert code == 0, errors
    calls = machine.calls()
    assert not [call for call in calls if call.startswith("kind create") or "key new" in call]
    assert [call for call in calls if call.startswith("kind load")] == [
        f"kind load image-archive --name ash TMP/{name}.tar" for name in ("hub", "recipes")
    ]
    hub = "kubectl --context kind-ash --namespace ash rollout"
    assert [call for call in calls if " rollout " in call] == [
        f"{hub} restart deployment/ash-hub deployment/ash-egress",
        f"{hub} status deployment/ash-hub --timeout 5m",
    ]
    assert "made before" in said and "ash_secret" not in said


def test_a_kind_is_created_where_there_is_none_of_that_name(machine: Machine) -> None:
    machine.add("minikube")
    machine.add("kind", "[ $1 != get ] || echo ash-of-another")
    machine.has_hive(release=False, keys=NO_KEYS)
    assert machine.all_local(ASH_LOCAL_CLUSTER="kind")[0] == 0
    calls = machine.calls()
    assert calls[:2] == ["kind get clusters", "kind create cluster --name ash --wait 180s"]
    assert not [call for call in calls if call.startswith("minikube")]


def test_no_call_goes_to_the_current_context(machine: Machine) -> None:
    machine.add("minikube")
    machine.has_hive(release=True, keys=NO_KEYS)
    assert machine.all_local()[0] == 0
    calls = [call for call in machine.calls() if call.startswith(("helm", "kubectl"))]
    assert len(calls) > 4 and all(re.search(r"--(kube-)?context minikube --namespace ash ", f"{it} ") for it in calls)


@pytest.mark.parametrize("broken", ["docker", "minikube", "helm"])
def test_what_fails_ends_it_and_no_key_is_made(broken: str, machine: Machine) -> None:
    machine.add("minikube")
    machine.has_hive(release=False, keys=NO_KEYS)
    fails = {"docker": "[ $1 != save ]", "minikube": "[ $1 != image ]", "helm": "exit 1"}
    machine.add(broken, fails[broken])
    code, said, _ = machine.all_local()
    assert code != 0 and not said
    assert not [call for call in machine.calls() if "key" in call]


def test_without_minikube_and_kind_it_says_what_to_install(machine: Machine) -> None:
    code, said, errors = machine.all_local()
    assert (code, said, machine.calls()) == (1, "", [])
    assert "no minikube and no kind here. Install one" in errors


@pytest.mark.parametrize("missing", ["kubectl", "helm"])
def test_without_a_program_that_it_needs_it_starts_nothing(missing: str, machine: Machine) -> None:
    machine.add("minikube")
    (machine.path / missing).unlink()
    code, _, errors = machine.all_local()
    assert (code, machine.calls()) == (1, [])
    assert f"There is no {missing} here." in errors


def test_an_unknown_cluster_is_refused(machine: Machine) -> None:
    code, _, errors = machine.all_local(ASH_LOCAL_CLUSTER="k3d")
    assert (code, machine.calls()) == (1, []) and "neither minikube nor kind" in errors


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"all-local-{secrets.token_hex(4)}"
    done("get", "namespace", "default")
    try:
        yield name
    finally:
        config = os.environ["ASH_TEST_KUBECONFIG"]
        helm("uninstall", "ash", "--namespace", name, "--no-hooks", "--ignore-not-found", "--kubeconfig", config)
        kubectl("delete", "namespace", name, f"{name}-sandboxes", "--ignore-not-found", "--wait=false")


@pytest.mark.kubernetes
@pytest.mark.timeout(420)
def test_on_a_cluster_that_has_the_images_it_installs_and_then_upgrades(namespace: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("kind", "docker"):
        add_tool(programs, name, "exit 0")
    # to the cluster of the tests, into a namespace of this test's
    script = """
given=()
while [ $# -gt 0 ]; do
  case $1 in
    --context | --kube-context) shift 2 ;;
    --namespace) given+=(--namespace {namespace}); shift 2 ;;
    *) given+=("$1"); shift ;;
  esac
done
exec {real} "${{given[@]}}"
"""
    for name in ("helm", "kubectl"):
        real = shutil.which(name)
        if real is None:
            pytest.skip(f"{name} is not installed: put it on the PATH")
        add_tool(programs, name, script.format(real=real, namespace=namespace))
    values = tmp_path / "values.yaml"
    values.write_text(json.dumps(on_one_node(namespace)))

    def all_local() -> str:
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "KUBECONFIG": os.environ["ASH_TEST_KUBECONFIG"],
            "HOME": str(tmp_path),
            "ASH_LOCAL_CLUSTER": "kind",
        }
        command = [ROOT / "scripts/all-local", "--values", str(values)]
        it = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert it.returncode == 0, it.stderr
        return it.stdout

    def hubs() -> set[str]:
        labels = ("--selector", "app.kubernetes.io/component=hub", "--output", "name")
        return set(done("get", "pods", "--namespace", namespace, *labels).split())

    assert re.search(r"export ASH_TOKEN=ash_\w{20,}$", all_local(), re.MULTILINE)
    before = hubs()
    assert "made before" in all_local()
    assert hubs() - before
