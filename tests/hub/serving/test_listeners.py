"""Where a hive listens for its other replicas, by its settings."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from ash_hub.serving.listeners import listen, listen_for_replicas, require_redis, seed_address
from ash_hub.settings import HubSettings
from ash_mcp.errors import ConfigError


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings(tmp_path: Path, **given: Any) -> HubSettings:
    return HubSettings(state_dir=tmp_path / "s", run_dir=tmp_path / "r", **given)


def test_without_an_address_it_is_a_free_port_of_this_machine() -> None:
    inside = listen_for_replicas(None)
    with inside.listener:
        host, port = inside.listener.getsockname()
        assert host == "127.0.0.1" and inside.address == f"127.0.0.1:{port}"


def test_an_address_of_this_machine_is_listened_at(free_port: int) -> None:
    inside = listen_for_replicas(f"127.0.0.1:{free_port}")
    with inside.listener:
        assert inside.listener.getsockname() == ("127.0.0.1", free_port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_leads_here_some_other_way_is_told_and_all_are_listened_at(host: str, free_port: int) -> None:
    inside = listen_for_replicas(f"{host}:{free_port}")
    with inside.listener:
        assert inside.listener.getsockname() == ("0.0.0.0", free_port)
        assert inside.address == f"{host}:{free_port}"


def test_a_port_that_is_taken_is_said_with_what_to_do(free_port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        with pytest.raises(ConfigError, match=f"port {free_port} cannot be used for the other hives.*--advertise"):
            listen_for_replicas(f"127.0.0.1:{free_port}")


def test_an_address_for_others_needs_the_redis_that_they_share(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--redis-url"):
        require_redis(settings(tmp_path, advertise="10.0.0.1:8421"))
    require_redis(settings(tmp_path, advertise="10.0.0.1:8421", redis_url=SecretStr("redis://x")))
    require_redis(settings(tmp_path))


@pytest.mark.parametrize("wrong", ["10.0.0.1", "10.0.0.1:0", ":8421", "0.0.0.0:8421", "[::]:8421", "http://a:1"])
def test_what_others_cannot_reach_is_no_address(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ValidationError, match="advertise"):
        settings(tmp_path, advertise=wrong)


@pytest.mark.parametrize(
    ("host", "given", "found"),
    [
        ("127.0.0.1", {}, "127.0.0.1"),
        ("localhost", {}, "127.0.0.1"),
        ("::1", {}, "[::1]"),
        ("0.0.0.0", {}, None),
    ],
)
def test_the_seeds_gateway_is_told_the_address_of_the_listener(
    tmp_path: Path, host: str, given: Any, found: str | None
) -> None:
    with listen(host, 0) as listener:
        assert seed_address(settings(tmp_path, host=host, **given), listener) == (found, listener.getsockname()[1])


def test_the_seeds_gateway_is_told_what_the_settings_say_and_nothing_of_tls(tmp_path: Path) -> None:
    with listen("0.0.0.0", 0) as listener:
        said = settings(tmp_path, host="0.0.0.0", seed={"address": "10.1.2.3:80"}, tls_cert=tmp_path / "c")
        assert seed_address(said, listener) == ("10.1.2.3", 80)
        assert seed_address(settings(tmp_path, seed={"address": "[fd00::1]:80"}), listener) == ("[fd00::1]", 80)
        assert seed_address(settings(tmp_path, tls_cert=tmp_path / "c"), listener) is None


@pytest.mark.parametrize("address", ["router.ash:8420", "0.0.0.0:8420", "10.1.2.3", ":8420"])
def test_the_seeds_gateway_is_told_no_name_and_no_address_that_means_all(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValidationError, match="address"):
        settings(tmp_path, seed={"address": address})
