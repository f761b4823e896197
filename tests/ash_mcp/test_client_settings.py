"""Where the SDK looks for a hive."""

from __future__ import annotations

from typing import Any

import pytest

from ash_mcp import ClientSettings, ConfigError


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
