"""What can be said of the pages about clusters without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from ash_hub.backends.kubernetes.pods import pod_of
from ash_hub.backends.kubernetes.rights import RIGHTS, Place
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.egress.limits import Limits
from ash_mcp.types import SandboxId, SandboxSpec
from tests.docs.pages import GUIDES, KUBERNETES, NOT_RUN, ROOT, RUN, blocks, commands, files
from tests.helm.chart import environment, template

SPEC: Final = SandboxSpec(id=SandboxId("sbx-a"), recipe="general", server={"python": "a:b"})
LOST: Final = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]
VALUES: Final = [
    (page, name)
    for page in GUIDES
    for name in files(page)
    if name not in ("cluster.yaml", "nodeadm.yaml", "way-in.yaml")
]


def name_of(page: Any) -> str:
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else str(page)


def rows(page: Path, header: str) -> list[list[str]]:
    """Return the cells of the table with that header."""
    (table,) = re.findall(rf"^{re.escape(header)}\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_every_block_of_commands_says_whether_it_is_run(page: Path) -> None:
    found = blocks(page)
    assert {block.language for block in found} <= {"bash", "yaml", "toml"}
    assert {block.title for block in found if block.language == "bash"} == {RUN, NOT_RUN}


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_of_a_cloud_are_not_said_to_be_run(page: Path) -> None:
    words = {line.split()[0] for text in commands(page, RUN) for line in text.splitlines() if line[0] != " "}
    assert words <= {"ash", "export", "helm", "kubectl"}


@pytest.mark.parametrize("page", [KUBERNETES, *GUIDES], ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, anchor


def test_the_page_has_every_setting_with_its_default() -> None:
    shown: dict[str, str] = {}
    for names, default, _ in rows(KUBERNETES, "| setting | default | meaning |"):
        for name, value in zip(names.split(", "), default.split(", "), strict=False):
            shown[name.strip("`")] = value.strip("`")
        for name in names.split(", ")[1:]:
            shown.setdefault(name.strip("`"), default)
    fields = KubernetesSettings.model_fields
    assert shown.keys() == fields.keys()
    for name, field in fields.items():
        if field.default not in (None, (), {}, Limits()) and name != "kind":
            said = "false" if field.default is False else str(field.default)
            assert shown[name] == said, name


def test_the_page_has_every_right() -> None:
    places = {"the sandboxes' namespace": Place.SANDBOXES, "`system_namespace`": Place.HIVE}
    place, shown = Place.CLUSTER, set[tuple[Place, str, tuple[str, ...]]]()
    for where, what, verbs in rows(KUBERNETES, "| where | what | verbs |"):
        place = places.get(where, Place.CLUSTER) if where else place
        shown.add((place, what.strip("`"), tuple(verbs.split(", "))))
    assert shown == {(right.place, right.resource, right.verbs) for right in RIGHTS}


def pod_with(template: Any) -> Any:
    """Return the spec of a pod with a template over it."""
    return pod_of(SPEC, KubernetesSettings(image="i", pod_template=template))["spec"]


def templates() -> list[Any]:
    return [yaml.safe_load(block.text) for block in blocks(KUBERNETES) if block.title == "# pod_template"]


def test_the_shown_template_with_a_gpu_keeps_what_the_pod_had() -> None:
    plain, spec = pod_with({}), pod_with(templates()[0])
    assert spec["tolerations"][:2] == plain["tolerations"]
    assert spec["tolerations"][2]["key"] == "nvidia.com/gpu"
    (container,) = spec["containers"]
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "2Gi", "nvidia.com/gpu": 1}
    assert container["securityContext"] == plain["containers"][0]["securityContext"]


def test_the_shown_template_with_volumes_has_the_workspace_on_a_disk() -> None:
    spec = pod_with(templates()[1])
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes.keys() == {"workspace", "home", "tmp", "datasets"}
    assert volumes["workspace"].keys() == {"name", "ephemeral"}
    mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts == {"/workspace": "workspace", "/home/ash": "home", "/tmp": "tmp", "/datasets": "datasets"}


@pytest.mark.parametrize(("page", "name"), VALUES, ids=name_of)
def test_the_shown_values_make_pods_for_the_nodes_of_the_guide(page: Path, name: str) -> None:
    values = files(page)[name]
    objects = template(values)
    settings = KubernetesSettings.model_validate_json(environment(objects)["ASH_HUB_BACKEND"])
    spec = pod_of(SPEC, settings)["spec"]
    if settings.node_selector:
        assert spec["nodeSelector"] == {"pool": "sandboxes"}
        assert [it["key"] for it in spec["tolerations"]] == [*LOST, "pool"]
        assert {it["tolerationSeconds"] for it in spec["tolerations"][:2]} == {settings.node_lost_seconds}
    if "runtimeClasses" in values:
        (made,) = [it for it in objects if it["kind"] == "RuntimeClass"]
        assert made["metadata"]["name"] == spec["runtimeClassName"]
        assert made["scheduling"]["nodeSelector"] == {"pool": "sandboxes"}
        assert made["scheduling"]["tolerations"][0]["value"] == "sandboxes"


def test_node_groups_have_the_label_and_the_taint_that_the_values_of_eks_name() -> None:
    shown = files(ROOT / "docs/deploy/eks.md")
    (group,) = [it for it in shown["cluster.yaml"]["managedNodeGroups"] if it["name"] == "sandboxes"]
    settings = shown["eks.yaml"]["sandboxes"]["settings"]
    toleration = settings["pod_template"]["spec"]["tolerations"][2]
    assert settings["node_selector"] == group["labels"]
    (taint,) = group["taints"]
    assert taint == {key: toleration[key] for key in ("key", "value", "effect")}


def test_the_network_of_gke_reaches_the_names_that_the_chart_reaches_elsewhere() -> None:
    shown = files(ROOT / "docs/deploy/gke.md")["gke.yaml"]["networkPolicies"]["dns"]
    default = yaml.safe_load((ROOT / "helm/ash/values.yaml").read_text())["networkPolicies"]["dns"]
    assert all(peer in shown for peer in default), json.dumps(default)
