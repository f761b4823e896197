"""What the body of the seed's spawn asks for, where its image stands for a recipe and where it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ash_hub.rest.spawn_body import ask_of, read_body
from ash_hub.spawning.recipes import ImageServer, Recipe
from ash_hub.spawning.spawn_request import ImageAsk, SpawnAsk
from ash_mcp.errors import ConfigError

IMAGES = {"timemagic/*": "general"}


def asked(*, runs_images: bool, **body: Any) -> SpawnAsk:
    return ask_of(read_body(json.dumps(body).encode()), "name", IMAGES, None, runs_images=runs_images)


@pytest.mark.parametrize(
    ("ports", "port"), [(None, 3000), ([], 3000), ([{"container_port": 8000}, {"container_port": 9000}], 8000)]
)
def test_an_image_that_stands_for_no_recipe_is_a_server_at_the_first_port(ports: Any, port: int) -> None:
    ask = asked(runs_images=True, image="me/own:1", ports=ports, env={"A": "1"})
    assert isinstance(ask, ImageAsk) and isinstance(ask.recipe, Recipe)
    assert ask.recipe.server.image == ImageServer(port=port, path="/mcp")
    assert (ask.image, ask.env, ask.recipe.network) == ("me/own:1", {"A": "1"}, "internet")


def test_one_that_stands_for_a_recipe_is_that_recipe_on_every_backend() -> None:
    for runs_images in (True, False):
        ask = asked(runs_images=runs_images, image="timemagic/rl-mcp:1")
        assert (type(ask), ask.recipe, ask.image) == (SpawnAsk, "general", None)


def test_where_there_are_no_images_the_rest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no recipe of this hive stands for image 'me/own:1'; it knows: timemagic/"):
        asked(runs_images=False, image="me/own:1")
