"""Where the SDK looks for a hive."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ash_mcp import ClientSettings, ConfigError
from ash_mcp.settings import DEFAULT_URL


def test_without_anything_it_is_the_hive_of_this_machine():
    settings = ClientSettings.from_environment(environ={})
    assert (settings.url, settings.token, settings.scope) == ("http://127.0.0.1:8420/mcp", None, None)
    assert settings.is_loopback


def test_environment_is_read_and_arguments_come_first():
    environ = {"ASH_URL": "https://hive.example", "ASH_TOKEN": "t", "ASH_SCOPE": "s", "ASH_TIMEOUT_SECONDS": "7.5"}
    settings = ClientSettings.from_environment(environ=environ)
    assert (settings.url, settings.token, settings.scope, settings.timeout_seconds) == (
        "https://hive.example/mcp",
        "t",
        "s",
        7.5,
    )
    assert not settings.is_loopback
    given = ClientSettings.from_environment(
        url="http://[::1]:1/mcp/in/x", token="u", scope="", timeout_seconds=1, environ=environ
    )
    assert (given.url, given.token, given.scope, given.timeout_seconds) == ("http://[::1]:1/mcp/in/x", "u", "", 1)
    assert given.is_loopback


def test_token_is_not_shown():
    assert "hush" not in repr(ClientSettings(token="hush"))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"url": "127.0.0.1:8420"}, "127.0.0.1:8420"),
        ({"url": "ftp://host/"}, "ftp"),
        ({"url": "http://"}, "URL"),
        ({"url": "http://host:port/"}, "port"),
        ({"token": "two\nlines"}, "ASH_TOKEN"),
        ({"token": "sécret"}, "ASH_TOKEN"),
        ({"scope": "a b"}, "a b"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_named(bad: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        ClientSettings(**bad)


def test_bound_in_the_environment_must_be_a_number():
    with pytest.raises(ConfigError, match="ASH_TIMEOUT_SECONDS"):
        ClientSettings.from_environment(environ={"ASH_TIMEOUT_SECONDS": "soon"})


def test_without_a_url_it_is_the_hive_that_this_user_runs(tmp_path: Path) -> None:
    environ = {"ASH_HUB_RUN_DIR": str(tmp_path)}
    assert ClientSettings.from_environment(environ=environ).url == DEFAULT_URL
    said = {"url": "http://127.0.0.1:7777/mcp", "pid": os.getpid()}
    (tmp_path / "hive.json").write_text(json.dumps(said))
    assert ClientSettings.from_environment(environ=environ).url == said["url"]
    assert ClientSettings.from_environment(url=DEFAULT_URL, environ=environ).url == DEFAULT_URL


@pytest.mark.parametrize("text", ["", "[]", '{"url": "http://127.0.0.1:7777/mcp", "pid": 999999999}', '{"pid": 1}'])
def test_what_a_hive_left_behind_is_not_believed(tmp_path: Path, text: str) -> None:
    (tmp_path / "hive.json").write_text(text)
    assert ClientSettings.from_environment(environ={"ASH_HUB_RUN_DIR": str(tmp_path)}).url == DEFAULT_URL


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/mcp", "http://h:1"),
        ("http://h:1/mcp/in/team", "http://h:1"),
        ("https://h/below/mcp?expand=all", "https://h/below"),
        ("https://h/ash", "https://h/ash"),
    ],
)
def test_the_doors_of_sandboxes_are_beside_the_hives_endpoint(url: str, base: str) -> None:
    assert ClientSettings(url=url).base_url == base
    assert ClientSettings(url=url).door_url("sb1", "files") == f"{base}/s/sb1/files"
