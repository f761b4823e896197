"""`scripts/images` and `.ci/cluster`, with tools that only write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
NEEDED: Final = ("bash", "cat", "dirname", "env", "mkdir", "realpath", "rmdir", "timeout")


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A PATH on which nothing builds images."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    return folder


def add_tool(folder: Path, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/usr/bin/env bash\n{script}\n")
    tool.chmod(0o755)


def run(script: str, *arguments: str, path: Path | str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / script, *arguments],
        env={"PATH": str(path), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


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
