"""The seed's hashes: those that tell its gateway where the hive is, and those that its control plane writes."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ash_mcp.errors import ConnectFailed, ProtocolError
from ash_mcp.types import Endpoint, SandboxId
from ash_router.store.base import SeedAddress
from ash_router.store.redis import RedisStore, open_redis
from ash_router.store.redis.seed_hashes import SeedHashes, open_seed_hashes
from tests.redis_server import RedisServer, running_redis
from tests.router.store.redis_parts import HURRY, PATIENCE, fresh_prefix, record

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

UUID = "trainer-0b6a1c9e-3d52-4c27-9a53-5a5f5ad1e0b1"


@asynccontextmanager
async def opened(server: RedisServer, host: str | None = "10.1.2.3") -> AsyncGenerator[RedisStore]:
    server.ask("DEL", f"sandbox:{UUID}")
    async with open_redis(
        server.url, fresh_prefix(), seed_address=SeedAddress(host, 8420), patience_seconds=PATIENCE
    ) as store:
        yield store


def hash_in(server: RedisServer) -> Mapping[str, Any]:
    return server.ask("HGETALL", f"sandbox:{UUID}")


def deleted_by_the_seed(host: str) -> tuple[str, str] | None:
    """Return the name and the namespace whose Service and Deployment the seed's control plane deletes, if any."""
    labels = host.split(".")
    return (labels[0], labels[1]) if len(labels) >= 2 else None


async def test_a_route_with_an_alias_has_a_hash_until_it_is_dropped(shared_redis: RedisServer):
    async with opened(shared_redis) as store:
        await store.put_route(record(1, alias=UUID))
        assert hash_in(shared_redis) == {"uuid": UUID, "host": "10.1.2.3", "port": "8420", "status": "ready"}
        await store.drop_route(SandboxId("sbx-1"))
        assert hash_in(shared_redis) == {}


async def test_a_route_without_an_alias_has_none(shared_redis: RedisServer):
    async with opened(shared_redis) as store:
        before = shared_redis.ask("KEYS", "sandbox:*")
        await store.put_route(record(1))
        assert shared_redis.ask("KEYS", "sandbox:*") == before
        await store.drop_route(SandboxId("sbx-1"))


async def test_a_route_that_is_put_again_puts_back_its_hash(shared_redis: RedisServer):
    """As every replica does after a flush, and where the one that had written it is gone."""
    async with opened(shared_redis, host="10.9.9.9") as gone:
        await gone.put_route(record(1, alias=UUID))
        async with open_redis(
            shared_redis.url, "other", seed_address=SeedAddress("10.1.2.3", 8421), patience_seconds=PATIENCE
        ) as store:
            await store.put_route(record(1, alias=UUID))
            assert hash_in(shared_redis)["host"] == "10.1.2.3"
            shared_redis.ask("DEL", f"sandbox:{UUID}")
            await store.put_route(record(1, alias=UUID))
            assert hash_in(shared_redis)["port"] == "8421"
            await store.drop_route(SandboxId("sbx-1"))


async def test_one_that_was_removed_comes_back_while_its_sandbox_has_a_route(shared_redis: RedisServer):
    async with opened(shared_redis) as store:
        await store.put_route(record(1, alias=UUID))
        written = hash_in(shared_redis)
        shared_redis.ask("DEL", f"sandbox:{UUID}")
        aliases = {SandboxId(f"sbx-{number}"): f"other-{number}" for number in range(2, 1500)}
        await store.restore_aliases({**aliases, SandboxId("sbx-1"): UUID})
        assert hash_in(shared_redis) == written
        assert shared_redis.ask("KEYS", "sandbox:other-*") == []
        shared_redis.ask("HSET", f"sandbox:{UUID}", "host", "10.9.9.9")
        await store.restore_aliases({SandboxId("sbx-1"): UUID})
        assert hash_in(shared_redis)["host"] == "10.9.9.9"  # another replica's
        await store.drop_route(SandboxId("sbx-1"))
        await store.restore_aliases({SandboxId("sbx-1"): UUID})
        assert hash_in(shared_redis) == {}


async def test_one_that_starts_says_so_and_not_after_it_is_ready(shared_redis: RedisServer):
    async with opened(shared_redis) as store:
        await store.note_starting(UUID)
        assert hash_in(shared_redis) == {"uuid": UUID, "host": "10.1.2.3", "port": "8420", "status": "starting"}
        assert shared_redis.ask("TTL", f"sandbox:{UUID}") > 0
        await store.put_route(record(1, alias=UUID))
        await store.note_starting(UUID)
        assert (hash_in(shared_redis)["status"], shared_redis.ask("TTL", f"sandbox:{UUID}")) == ("ready", -1)
        await store.drop_route(SandboxId("sbx-1"))


async def test_one_whose_start_fails_is_found_no_more(shared_redis: RedisServer):
    async with opened(shared_redis) as store:
        await store.note_starting(UUID)
        await store.drop_route(SandboxId("sbx-1"), UUID)
        assert hash_in(shared_redis) == {}


@pytest.mark.parametrize("host", [None, "10.1.2.3", "192.168.0.1", "[fd00::1]", "[::ffff:10.1.2.3]"])
async def test_no_address_of_ours_names_what_the_seed_could_delete(shared_redis: RedisServer, host: str | None):
    async with opened(shared_redis, host) as store:
        await store.put_route(record(1, alias=UUID))
        written = hash_in(shared_redis)["host"]
        await store.drop_route(SandboxId("sbx-1"))
    ipaddress.ip_address(written.strip("[]"))
    assert host is not None or written == "127.0.0.1"
    deleted = deleted_by_the_seed(written)
    # a Service begins with a letter, and no namespace of ours is a number
    assert deleted is None or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", deleted[0])
    assert deleted is None or re.fullmatch(r"[0-9]+", deleted[1])


async def test_who_may_not_write_the_hash_is_kept_from_nothing_else(shared_redis: RedisServer):
    prefix = fresh_prefix()
    rights = ["+@all", "~" + prefix + ":*", "&*"]
    shared_redis.ask("ACL", "SETUSER", "narrow", "reset", "on", ">secret", *rights)
    try:
        url = shared_redis.url.replace("redis://", "redis://narrow:secret@")
        async with open_redis(
            url, prefix, seed_address=SeedAddress("10.1.2.3", 8420), patience_seconds=PATIENCE
        ) as store:
            await store.put_route(record(1, alias=UUID))
            await store.note_starting(UUID)
            await store.restore_aliases({SandboxId("sbx-1"): UUID})
            assert [found["alias"] for found in await store.routes()] == [UUID]
            await store.drop_route(SandboxId("sbx-1"))
            assert (await store.routes(), hash_in(shared_redis)) == ([], {})
    finally:
        shared_redis.ask("ACL", "DELUSER", "narrow")


@pytest.fixture
async def hashes(shared_redis: RedisServer) -> AsyncGenerator[SeedHashes]:
    shared_redis.ask("DEL", f"sandbox:{UUID}")
    async with open_seed_hashes(shared_redis.url, patience_seconds=PATIENCE) as hashes:
        yield hashes
    shared_redis.ask("DEL", f"sandbox:{UUID}")


@pytest.mark.parametrize("more", [(), ("expire_time", "1790000000"), ("name", "trainer", "namespace", "apps")])
async def test_a_hash_of_the_seeds_control_plane_says_where_its_sandbox_is(
    shared_redis: RedisServer, hashes: SeedHashes, more: Sequence[str]
):
    host = "trainer.apps.svc.cluster.local"
    fields = ("uuid", UUID, "host", host, "port", "3000", "status", "ready", *more)
    shared_redis.ask("HSET", f"sandbox:{UUID}", *fields)
    found = await hashes.find(UUID)
    assert found == Endpoint(host=host, port=3000, proves=False)
    assert (await hashes.find(f"{UUID}x"), await hashes.unready()) == (None, None)


@pytest.mark.parametrize(
    ("fields", "endpoint"),
    [
        (("host", "10.0.0.7"), ("10.0.0.7", 3000)),
        (("host", "10.0.0.7", "port", ""), ("10.0.0.7", 3000)),
        (("host", "[fd00::7]", "port", "80"), ("fd00::7", 80)),
        (("host", "", "port", "80"), None),
        (("port", "80"), None),
    ],
)
async def test_a_hash_may_lack_a_port_and_not_a_host(
    shared_redis: RedisServer, hashes: SeedHashes, fields: Sequence[str], endpoint: tuple[str, int] | None
):
    shared_redis.ask("HSET", f"sandbox:{UUID}", *fields)
    found = await hashes.find(UUID)
    assert (None if found is None else (found.host, found.port)) == endpoint


@pytest.mark.parametrize(
    "wrong", [("host", "a\r\nx: y"), ("host", "a/b"), ("host", "a", "port", "x"), ("host", "a", "port", "70000")]
)
async def test_a_hash_that_names_no_server_is_no_route(
    shared_redis: RedisServer, hashes: SeedHashes, wrong: Sequence[str]
):
    shared_redis.ask("HSET", f"sandbox:{UUID}", *wrong)
    with pytest.raises(ProtocolError, match=UUID):
        await hashes.find(UUID)


async def test_without_redis_nothing_is_said_of_a_route(tmp_path: Path):
    with running_redis(tmp_path) as server:
        async with open_seed_hashes(server.url, patience_seconds=PATIENCE) as hashes:
            server.stop()
            hashes._link._patience = HURRY  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(ConnectFailed):
                await hashes.find(UUID)
            assert await hashes.unready() == "redis not ready"
