"""What the Dockerfiles say, and what other files say alike; nothing is built."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

from ash_hub.backends.runner import RUNNER_ARGUMENTS

ROOT: Final = Path(__file__).parents[2]
NAMES: Final = ("hub", "recipes")


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / name / "Dockerfile").read_text())
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [(word, rest) for word, rest in lines]


def values(name: str, wanted: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == wanted]


def test_the_recipes_image_starts_the_runner_as_every_backend_does() -> None:
    (command,) = values("recipes", "CMD")
    assert json.loads(command) == ["/opt/ash/bin/python", *RUNNER_ARGUMENTS]


def test_the_test_clusters_image_starts_the_runner_as_the_recipes_image_does() -> None:
    (command,) = values("recipes", "CMD")
    (loaded,) = re.findall(r"localhost/ash/recipes:dev (.*) >&2", (ROOT / ".ci/cluster").read_text())
    assert loaded.split() == json.loads(command)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_base_comes_from_a_registry_and_the_base_can_be_given(name: str) -> None:
    first, base = instructions(name)[0]
    assert first == "ARG"
    # a registry's host would stand before a slash
    assert re.fullmatch(r"BASE=[a-z]+:[\w.-]+", base)
    assert values(name, "FROM") == ["${BASE} AS build", "${BASE}"]
    assert re.findall(r"--from=(\S+)", (ROOT / name / "Dockerfile").read_text()) == ["build"]
    assert not re.search(r"://|amd64|arm64|x86_64|aarch64", (ROOT / name / "Dockerfile").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_user_is_a_number_since_a_cluster_cannot_tell_that_a_name_is_not_root(name: str) -> None:
    assert values(name, "USER") == ["10001:10001"]


@pytest.mark.parametrize("name", NAMES)
def test_every_extra_that_an_image_installs_exists_or_is_the_clusters(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = (rest.removeprefix("EXTRAS=") for rest in values(name, "ARG") if rest.startswith("EXTRAS="))
    assert set(asked.split(",")) <= {*extras, "kubernetes"}


def test_the_build_sees_every_package_of_the_wheel_and_little_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    files = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert {line[1:] for line in lines if line.startswith("!")} == {*packages, *files}


def test_the_hub_lists_its_recipes_without_the_libraries_that_serve_them() -> None:
    # the hub's image does not have them
    code = (
        "import sys\n"
        "for name in ('fastmcp', 'ddgs', 'markdownify'): sys.modules[name] = None\n"
        "from ash_hub.spawning.recipes import Catalog\n"
        "print(*Catalog.load().names())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["echo", "general", "python", "swe"], done.stderr


@pytest.mark.parametrize("name", ["python", "swe"])
def test_the_image_of_a_recipe_stands_on_that_of_all_and_ends_as_its_user(name: str) -> None:
    lines = (ROOT / "recipes" / f"{name}.Dockerfile").read_text().splitlines()
    assert "ARG BASE=localhost/ash/recipes:dev" in lines and "FROM ${BASE}" in lines
    assert lines[-1] == "USER 10001:10001" == f"USER {values('recipes', 'USER')[0]}"
    assert not any(re.search(r"://|CMD|ENTRYPOINT", line) for line in lines)
