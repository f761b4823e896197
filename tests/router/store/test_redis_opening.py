"""Finding Redis, and saying what is wrong with it when it cannot be used."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ash_mcp.errors import ConfigError
from ash_mcp.types import DEFAULT_SCOPE, SandboxId
from ash_router.store.memory import MemoryStore
from ash_router.store.redis import open_redis, opening
from ash_router.store.select import open_store
from tests.redis_server import BINARY, RedisServer, running_redis
from tests.router.store.redis_parts import PATIENCE, fresh_prefix, record, until

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

ONE = SandboxId("sbx-1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ash_router.store.redis.open_redis", partial(open_redis, patience_seconds=PATIENCE))


async def refused(url: str, prefix: str = "ash") -> str:
    with pytest.raises(ConfigError) as caught:
        async with open_store(url, prefix):
            pass
    return caught.value.message


async def test_without_a_url_the_store_is_this_process():
    async with open_store() as store:
        assert isinstance(store, MemoryStore)


async def test_nothing_at_the_address_is_a_config_error_without_the_password():
    message = await refused("redis://ash:hidden@127.0.0.1:1/0?client_name=x")
    assert "redis://127.0.0.1:1/0 cannot be used" in message and "Is it running" in message
    assert "hidden" not in message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1", "must be one of: redis://"),
        ("redis://127.0.0.1:1?nonsense=1", "nonsense"),
        ("redis+sentinel://127.0.0.1:1", "name of the service"),
        ("redis+sentinel://127.0.0.1:x/main", "not host:port"),
        ("redis+sentinel://127.0.0.1:1/main?nonsense=1", "unknown options: nonsense"),
    ],
)
async def test_a_url_that_is_none_is_refused_with_the_forms(url: str, said: str):
    message = await refused(url)
    assert said in message and "rediss://" in message


async def test_a_prefix_that_could_reach_into_another_is_refused():
    assert "prefix of keys" in await refused("redis://127.0.0.1:1", "a:b")


async def test_a_wrong_password_and_none_are_said_to_be_so(tmp_path: Path):
    with running_redis(tmp_path, password="right") as server:
        for user_info in ("", ":wrong@"):
            message = await refused(f"redis://{user_info}127.0.0.1:{server.port}")
            assert "password" in message and "wrong" not in message.replace("WRONGPASS", "")
        async with open_store(f"redis://:right@127.0.0.1:{server.port}") as store:
            assert store.unready() is None


async def test_an_old_server_is_refused(shared_redis: RedisServer, monkeypatch: pytest.MonkeyPatch):
    async def info(client: Any, section: str) -> dict[str, str]:
        return {"redis_version": "6.0.16"}

    monkeypatch.setattr(opening, "_info", info)
    assert "is 6.0.16; Ash needs 6.2" in await refused(shared_redis.url)


async def test_a_server_that_evicts_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with running_redis(tmp_path, "--maxmemory-policy", "allkeys-lru") as server:
        with caplog.at_level(logging.WARNING, "ash.store"):
            async with open_store(server.url) as store:
                [warning] = store.warnings()
        assert "maxmemory-policy allkeys-lru" in warning and "noeviction" in warning
        assert warning in caplog.messages
        server.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        async with open_store(server.url) as store:
            assert store.warnings() == ()


async def test_databases_and_prefixes_keep_hives_apart(shared_redis: RedisServer):
    def keys() -> set[str]:
        return {key for number in (0, 1, 2) for key in _keys(shared_redis, number)}

    prefix, before = fresh_prefix(), keys()
    places = [(f"{shared_redis.url}/1", prefix), (f"{shared_redis.url}/2", prefix), (f"{shared_redis.url}/1", "else")]
    for number, (url, name) in enumerate(places):
        async with open_store(url, name) as store:
            assert await store.routes() == []
            await store.put_route(record(number))
            assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"
    (first, its_prefix), (second, _), _ = places
    async with open_store(first, its_prefix) as one, open_store(second, its_prefix) as two:
        async with one.subscribe("news") as news:
            await two.publish("news", "not for the first")
            await one.publish("news", "for the first")
            with anyio.fail_after(30):
                assert await anext(news) == "for the first"
    written = keys() - before
    assert written and all(key.startswith((f"{prefix}:", "else:")) for key in written)


def _keys(server: RedisServer, database: int) -> list[str]:
    with redis.Redis(port=server.port, db=database, decode_responses=True) as client:
        return cast("Any", client).execute_command("KEYS", "*")


async def test_the_keys_of_a_release_before_layouts_are_taken_and_marked(shared_redis: RedisServer):
    prefix = fresh_prefix()
    async with open_store(shared_redis.url, prefix) as store:
        await store.put_route(record(1))
    shared_redis.ask("DEL", f"{prefix}:layout")
    async with open_store(shared_redis.url, prefix) as store:
        assert store.layout() == "1" == shared_redis.ask("GET", f"{prefix}:layout")
        assert await store.routes() == [record(1)]


async def test_a_layout_of_another_release_is_refused_and_left_as_it_is(shared_redis: RedisServer):
    prefix = fresh_prefix()
    shared_redis.ask("SET", f"{prefix}:layout", "2")
    message = await refused(shared_redis.url, prefix)
    assert f"the keys {prefix}:* in Redis at" in message and "layout '2'" in message and "knows only '1'" in message
    assert "another prefix" in message and "delete these keys" in message
    assert [key for key in _keys(shared_redis, 0) if key.startswith(f"{prefix}:")] == [f"{prefix}:layout"]
    assert shared_redis.ask("GET", f"{prefix}:layout") == "2"


async def test_a_layout_that_changes_under_a_replica_is_reported_and_nothing_restored(
    shared_redis: RedisServer, caplog: pytest.LogCaptureFixture
):
    restored: list[int] = []

    async def restore() -> None:
        restored.append(1)

    prefix = fresh_prefix()
    async with open_redis(shared_redis.url, prefix, look_seconds=0.05) as store:
        store.on_flushed(restore)
        shared_redis.ask("SET", f"{prefix}:layout", "2")
        shared_redis.ask("DEL", f"{prefix}:epoch")
        await until(lambda: "another release changed the keys in Redis" in caplog.messages)
        assert not restored
        shared_redis.ask("DEL", f"{prefix}:layout")
        await until(lambda: restored)


async def test_a_unix_socket_will_do(tmp_path: Path):
    with running_redis(tmp_path, "--unixsocket", str(tmp_path / "redis.sock")):
        async with open_store(f"unix://{tmp_path / 'redis.sock'}?db=1") as store:
            assert await store.claim_key("me", DEFAULT_SCOPE, "key", ONE) == ONE


async def test_tls_password_and_database_stand_in_the_url(tmp_path: Path):
    certificate, key = _certificate(tmp_path)
    options = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no")
    with running_redis(tmp_path, *options, password="p@ss/word", tls=True) as server:
        place = f"127.0.0.1:{server.port}/3"
        async with open_store(f"rediss://:p%40ss%2Fword@{place}?ssl_ca_certs={certificate}") as store:
            await store.put_route(record(1))
            async with store.subscribe("news") as news:
                await store.publish("news", "hello")
                with anyio.fail_after(30):
                    assert await anext(news) == "hello"
        assert list(server.ask("INFO", "keyspace")) == ["db3"]
        assert "certificate verify failed" in await refused(f"rediss://:p%40ss%2Fword@{place}")


async def test_an_error_of_the_user_comes_out_as_it_is(shared_redis: RedisServer):
    with pytest.raises(KeyError, match="mine"):
        async with open_store(shared_redis.url, fresh_prefix()):
            raise KeyError("mine")


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[tuple[str, RedisServer, RedisServer]]:
    """A primary, its replica, and a sentinel that watches them: its address, and both."""
    folders = [tmp_path / name for name in ("primary", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    with running_redis(folders[0]) as primary:
        with running_redis(folders[1], "--replicaof", f"127.0.0.1 {primary.port}") as replica:
            watcher = RedisServer(folders[2])
            (folders[2] / "sentinel.conf").write_text(
                f"port {watcher.port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {primary.port} 1\n"
                "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
            )
            assert BINARY is not None
            command = [BINARY, str(folders[2] / "sentinel.conf"), "--sentinel", "--logfile", str(tmp_path / "log")]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            try:
                yield f"redis+sentinel://127.0.0.1:{watcher.port}/main/0", primary, replica
            finally:
                process.kill()
                process.wait()


@pytest.mark.heavy
async def test_sentinels_say_where_redis_is_also_after_a_failover(sentinel: tuple[str, RedisServer, RedisServer]):
    url, primary, replica = sentinel
    await until(lambda: replica.ask("INFO", "replication")["master_link_status"] == "up")
    await until(lambda: _knows_both(url))
    restored = anyio.Event()

    async def restore() -> None:
        restored.set()

    async with open_redis(url, "ash", patience_seconds=PATIENCE, look_seconds=0.05, grace_seconds=0.3) as store:
        store.on_flushed(restore)
        assert await store.reserve_session("me", DEFAULT_SCOPE, None, ONE) == "sb1"
        async with store.subscribe("news") as news:
            assert primary.ask("WAIT", 1, 5000) == 1
            primary.kill()
            with anyio.fail_after(60):
                await restored.wait()
                assert await anext(news) == ""
            await until(lambda: store.unready() is None)
            assert await store.reserve_session("me", DEFAULT_SCOPE, None, SandboxId("sbx-2")) == "sb2"
            assert replica.ask("INFO", "replication")["role"] == "master"


def _knows_both(url: str) -> bool:
    port = int(url.rpartition(":")[2].partition("/")[0])
    try:
        with redis.Redis(port=port, decode_responses=True, protocol=2) as client:
            return bool(cast("Any", client).execute_command("SENTINEL", "REPLICAS", "main"))
    except redis.ConnectionError:
        return False


def _certificate(folder: Path) -> tuple[str, str]:
    """Write a certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")
