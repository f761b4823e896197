"""Recipes come from entry points and directories, and a wrong one says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ash_hub.spawning.recipes import Catalog, ImageServer
from ash_mcp.errors import ConfigError, RecipeNotFound

GOOD = """
name = "mine"
description = "A recipe of my own."
[server]
python = "server:mcp"
"""


def write(folder: Path, text: str, name: str = "mine") -> Path:
    (folder / name).mkdir()
    (folder / name / "recipe.toml").write_text(text)
    return folder


def test_the_recipes_that_come_along_are_valid() -> None:
    assert {"general", "echo"} <= set(Catalog.load().names())


def test_a_directory_holds_recipes_one_folder_down(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    (tmp_path / "mine" / "server.py").touch()
    recipe = Catalog.load([tmp_path]).get("mine")
    assert recipe.folder == str(tmp_path / "mine")
    assert recipe.server.python == "server:mcp"


def test_a_folder_with_nothing_but_the_recipe_is_no_part_of_it(tmp_path: Path) -> None:
    # as a chart's value is: a pod could not see the folder
    assert Catalog.load([write(tmp_path, GOOD)]).get("mine").folder is None


def test_a_directory_can_be_a_recipe_itself(tmp_path: Path) -> None:
    assert "mine" in Catalog.load([write(tmp_path, GOOD) / "mine"]).names()


def test_an_unknown_recipe_lists_those_that_there_are() -> None:
    with pytest.raises(RecipeNotFound, match=r"there is no recipe 'nope'; there are: .*echo"):
        Catalog.load().get("nope")


IMAGE = """
name = "mine"
description = "A server by itself."
image = "registry.test/own:1"
[server.image]
port = 3000
"""


def test_a_recipe_may_be_an_image_that_serves_by_itself(tmp_path: Path) -> None:
    [recipe] = [each for each in Catalog.load([write(tmp_path, IMAGE)]) if each.name == "mine"]
    assert recipe.server.image == ImageServer(port=3000, path="/mcp")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "not readable as TOML"),
        ('name = "mine"\ndescription = "x"', "server: Field required"),
        (GOOD.replace('"mine"', '"Mine"'), "name: .*pattern"),
        (GOOD + 'stdio = { command = ["x"] }', "exactly one of python, http, stdio and image"),
        (GOOD.replace("server:mcp", "server"), "server.python"),
        ('netwerk = "none"' + GOOD, "netwerk: Extra inputs"),
        ('network = "some"' + GOOD, "network"),
        ('folder = "/etc"\nimage = 7' + GOOD, "image"),
        (IMAGE.replace("3000", "0"), r"server\.image\.port: .*greater than or equal to 1"),
        (IMAGE.replace("port = 3000", ""), r"server\.image\.port: Field required"),
        (IMAGE + 'path = "mcp"', r"server\.image\.path: .*pattern"),
        (IMAGE + 'path = "/m cp"', r"server\.image\.path: .*pattern"),
        (IMAGE + "command = []", r"server\.image\.command: .*at least 1 item"),
        (IMAGE + 'args = "x"', r"server\.image\.args"),
        (IMAGE + "ports = [1]", r"server\.image\.ports: Extra inputs"),
    ],
)
def test_a_wrong_recipe_names_the_file_and_the_field(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.toml.*{says}"):
        Catalog.load([write(tmp_path, text)])


def test_a_directory_without_recipes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no recipe\.toml"):
        Catalog.load([tmp_path])
