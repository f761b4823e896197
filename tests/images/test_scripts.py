"""`scripts/images` and `.ci/cluster`, with tools that only write down how they were called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.stand_ins import add_tool, run, tools_in


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A PATH on which nothing builds images."""
    return tools_in(tmp_path / "bin")


def test_both_images_are_built_by_the_first_tool_that_answers(bin_folder: Path) -> None:
    add_tool(bin_folder, "docker", "exit 1")  # no daemon
    add_tool(bin_folder, "buildah", 'echo buildah "$@"')
    add_tool(bin_folder, "podman", 'echo podman "$@"')
    done = run("scripts/images", path=bin_folder)
    assert done.stdout.splitlines() == [
        "buildah build --file hub/Dockerfile --tag localhost/ash/hub:dev .",
        "buildah build --file recipes/Dockerfile --tag localhost/ash/recipes:dev .",
    ]
    assert done.returncode == 0


def test_one_image_is_built_as_the_caller_wants_it(bin_folder: Path) -> None:
    add_tool(bin_folder, "buildah", 'echo buildah "$@"')
    add_tool(bin_folder, "podman", 'echo podman "$@"')
    wanted = {"ASH_IMAGE_BUILDER": "podman", "ASH_IMAGE_PREFIX": "registry.test/a", "ASH_IMAGE_TAG": "1"}
    done = run("scripts/images", "hub", "--", "--build-arg", "BASE=b:1", path=bin_folder, **wanted)
    tag = "registry.test/a/hub:1"
    assert done.stdout == f"podman build --file hub/Dockerfile --tag {tag} --build-arg BASE=b:1 .\n"


@pytest.mark.parametrize(
    ("builder", "saved"),
    [
        ("docker", "save --output {file} {image}"),
        ("buildah", "push --quiet {image} docker-archive:{file}:{image}"),
        ("podman", "save --quiet --format docker-archive --output {file} {image}"),
    ],
)
def test_an_image_is_saved_where_archives_are_wanted(builder: str, saved: str, bin_folder: Path) -> None:
    add_tool(bin_folder, builder, 'echo "$@"')
    done = run("scripts/images", "hub", path=bin_folder, ASH_IMAGE_ARCHIVES="/a")
    assert done.stdout.splitlines()[-1] == saved.format(file="/a/hub.tar", image="localhost/ash/hub:dev"), done.stderr


def test_without_a_tool_it_says_what_to_install(bin_folder: Path) -> None:
    done = run("scripts/images", path=bin_folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Install buildah or podman" in done.stderr


def test_a_build_that_fails_is_the_last(bin_folder: Path) -> None:
    add_tool(bin_folder, "buildah", 'echo "$@"; exit 3')
    done = run("scripts/images", path=bin_folder)
    assert (done.returncode, len(done.stdout.splitlines())) == (3, 1)


@pytest.mark.parametrize("arguments", [("router",), ("hub", "recipes"), ("--rootfs",)])
def test_wrong_arguments_get_the_usage(bin_folder: Path, arguments: tuple[str, ...]) -> None:
    add_tool(bin_folder, "buildah", 'echo "$@"')
    done = run("scripts/images", *arguments, path=bin_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


def test_a_directory_of_somebody_elses_is_not_replaced(bin_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").touch()
    done = run("scripts/images", "--rootfs", str(mine), path=bin_folder)
    assert done.returncode == 1 and "Remove it, or name another directory" in done.stderr
    assert (mine / "file").exists()


def test_a_cluster_that_is_there_is_used_as_it_is() -> None:
    done = run(".ci/cluster", path=os.environ["PATH"], ASH_TEST_KUBECONFIG="/a/config", ASH_TEST_CLUSTER="/none")
    assert (done.returncode, done.stdout) == (0, "/a/config\n")


def test_without_a_cluster_and_the_script_that_makes_one_it_says_so() -> None:
    done = run(".ci/cluster", path=os.environ["PATH"], ASH_TEST_CLUSTER="/none/cluster.sh")
    assert (done.returncode, done.stdout) == (1, "")
    assert "ASH_TEST_KUBECONFIG" in done.stderr
