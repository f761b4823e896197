"""That a sandbox on TCP proves to be itself before it gets a byte, and that nobody else on its address gets one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ash_hub.spawning.runner_client import RunnerClient
from ash_mcp.errors import AshError, ConnectFailed
from ash_mcp.types import Endpoint, SandboxId
from ash_recipes.runner.config import Listen, RunnerConfig
from ash_recipes.runner.problems import Problem
from ash_recipes.runner.proof import prove, unseal
from ash_router.calls.direct import SESSION_HEADER
from ash_router.routes import Route, Routes
from ash_router.store.memory import MemoryStore
from ash_router.upstream import pool
from ash_router.upstream.call_tokens import CallTokens
from ash_router.upstream.proof import Challenge, SandboxKeys, seal
from tests.router.relay_parts import Rig, failure, legacy, modern, open_rig, route_to, tool_call
from tests.router.sandbox_parts import response
from tests.router.sessions.test_relay_sessions import add, session

pytestmark = pytest.mark.anyio

KEYS = SandboxKeys(Ed25519PrivateKey.generate())
ONE = SandboxId("sbx-one")
SECRET = "s3cret-of-a-caller"


def config(sandbox: SandboxId, key: bytes) -> RunnerConfig:
    return RunnerConfig(listen=Listen(), sandbox_id=sandbox, key=key)


def challenge(sandbox: SandboxId = ONE) -> Challenge:
    return Challenge(KEYS, Endpoint(host="::1", port=1).of(sandbox))


def nonce_in(request: bytes) -> bytes | None:
    _, found, rest = request.partition(b"ash-nonce: ")
    return rest.partition(b"\r\n")[0] if found else None


def answered(request: bytes, sandbox: SandboxId = ONE, key: bytes | None = None) -> bytes:
    """What the runner of a sandbox answers."""
    return json.dumps(prove(config(sandbox, KEYS.of(sandbox) if key is None else key), nonce_in(request))).encode()


def test_a_runner_answers_what_its_hive_asks() -> None:
    asked = challenge()
    assert asked.is_answered(200, answered(asked.request))
    assert not asked.is_answered(404, answered(asked.request))


def test_no_other_sandbox_key_or_question_gives_the_answer() -> None:
    asked, before = challenge(), challenge()
    for other in (SandboxId("sbx-two"), SandboxId("sbx-one.1")):
        assert not asked.is_answered(200, answered(asked.request, other))
        assert not asked.is_answered(200, answered(asked.request, ONE, KEYS.of(other)))
    assert before.is_answered(200, replayed := answered(before.request))
    assert not asked.is_answered(200, replayed)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"proof": 1}', b'{"proof": ""}', b'{"proof": "\xc3\xa4"}', b"[" * 1000]
)
def test_nonsense_is_no_proof(body: bytes) -> None:
    assert not challenge().is_answered(200, body)


@pytest.mark.parametrize("nonce", [None, b"", b"0" * 63, b"0" * 65, b"G" * 64])
def test_a_runner_proves_nothing_to_who_asks_otherwise_or_without_a_key(nonce: bytes | None) -> None:
    with pytest.raises(Problem):
        prove(config(ONE, KEYS.of(ONE)), nonce)
    with pytest.raises(Problem):
        prove(config(ONE, b""), b"0" * 64)


def test_a_claim_is_opened_by_its_sandbox_alone() -> None:
    sealed = json.loads(seal(KEYS, ONE, b"secrets"))
    assert unseal(config(ONE, KEYS.of(ONE)), sealed) == b"secrets"
    changed = bytearray(base64.b64decode(sealed["sealed"]))
    changed[-1] ^= 1
    for shape in ({}, {"sealed": 1}, {"sealed": "?"}, {"sealed": ""}, {"sealed": base64.b64encode(changed).decode()}):
        with pytest.raises(Problem):
            unseal(config(ONE, KEYS.of(ONE)), shape)
    other = SandboxId("sbx-two")
    with pytest.raises(Problem):
        unseal(config(other, KEYS.of(other)), sealed)
    assert seal(KEYS, ONE, b"secrets") != seal(KEYS, ONE, b"secrets")


def test_every_replica_derives_the_same_key_and_another_hive_another() -> None:
    key = Ed25519PrivateKey.generate()
    assert SandboxKeys(key).of(ONE) == SandboxKeys(key).of(ONE) != KEYS.of(ONE)
    assert len(KEYS.of(ONE)) == 32


async def test_a_route_keeps_that_its_server_cannot_prove_itself() -> None:
    store = MemoryStore()
    here, there = Routes(store), Routes(store)
    for number, proves in enumerate((True, False)):
        endpoint = Endpoint(host="::1", port=1, proves=proves)
        bound = replace(route_to(Path("x"), f"sb{number}"), endpoint=endpoint)
        await there.bind(bound)
        await here.catch_up()
        found = here.get(bound.sandbox_id)
        assert found is not None and found == bound and found.endpoint.must_prove is proves
    assert not route_to(Path("x")).endpoint.must_prove


async def test_a_route_keeps_that_its_server_has_no_runner_and_where_it_serves() -> None:
    store = MemoryStore()
    here, there = Routes(store), Routes(store)
    endpoint = Endpoint(host="::1", port=1, server_path="/serve")
    bound = replace(route_to(Path("x")), endpoint=endpoint)
    await there.bind(bound)
    await here.catch_up()
    found = here.get(bound.sandbox_id)
    assert found is not None and found == bound and found.endpoint.server_path == "/serve"
    assert not found.endpoint.must_prove and not found.endpoint.has_runner


# Somebody else at a sandbox's address.


@dataclass
class Impostor:
    """Has a sandbox's address, keeps all that it is sent, and answers as it likes."""

    answer: Callable[[bytes], bytes | None]
    """Of a request; None closes the connection."""
    received: list[bytes] = field(default_factory=list[bytes])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                self.received.append(data)
                said = self.answer(data)
                if said is None:
                    break
                writer.write(said)
        except ConnectionError:
            pass  # it was found out
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self, host: str) -> AsyncGenerator[Endpoint]:
        server = await asyncio.start_server(self.serve, host, 0)
        async with server:
            yield Endpoint(host=host, port=server.sockets[0].getsockname()[1])

    def heard(self) -> list[list[bytes]]:
        """The names of what each request said: nothing but the question may have come."""
        return [[line.partition(b":")[0] for line in data.split(b"\r\n")] for data in self.received]


def proves_as(sandbox: SandboxId, keys: SandboxKeys) -> Callable[[bytes], bytes]:
    def answer(data: bytes) -> bytes:
        shape = prove(config(sandbox, keys.of(sandbox)), nonce_in(data))
        return response(json.dumps(shape).encode())

    return answer


def replays(keys: SandboxKeys, sandbox: SandboxId) -> Callable[[bytes], bytes]:
    """Answers with a good proof of the same sandbox, to a question that was asked before."""
    asked = Challenge(keys, Endpoint(host="::1", port=1).of(sandbox))
    old = prove(config(sandbox, keys.of(sandbox)), nonce_in(asked.request))
    return lambda _: response(json.dumps(old).encode())


def kinds(route: Route, tokens: CallTokens) -> dict[str, Callable[[bytes], bytes | None]]:
    keys, me = tokens.sandbox_keys, route.sandbox_id
    return {
        "another sandbox": proves_as(SandboxId("sbx-two"), keys),
        "another hive's": proves_as(me, KEYS),
        "a replay": replays(keys, me),
        "an MCP server": lambda _: response(b'{"jsonrpc":"2.0","id":1,"result":{}}'),
        "a web server": lambda _: response(b"no", status="404 Not Found", kind="text/plain"),
        "too much": lambda _: response(b"x" * 100_000),
        "a redirect": lambda _: response(b"", status="302 Found", more="location: /\r\n"),
        "no HTTP": lambda _: b"220 ready\r\n",
        "a hang-up": lambda _: None,
        "a proof and more": lambda data: proves_as(me, keys)(data) + b"HTTP/1.1 200 OK\r\n\r\n",
    }


QUESTION = [b"GET /_ash/proof HTTP/1.1", b"host", b"ash-nonce", b"", b""]
ROUTE = route_to(Path("unused"))
TOKENS = CallTokens(Ed25519PrivateKey.generate())
KINDS = kinds(ROUTE, TOKENS)


async def by_name(rig: Rig) -> dict[str, Any]:
    async with rig.connect() as wire:
        await wire.send(modern("sb1_add", tool_call("sb1_add", {"a": SECRET})))
        return failure((await wire.answer())[2])


async def by_door(rig: Rig) -> dict[str, Any]:
    async with rig.connect() as wire:
        body = tool_call("add", {"a": SECRET})
        await wire.send(modern("add", body, more=f"{SESSION_HEADER.decode()}: sb1\r\n"))
        return json.loads((await wire.answer())[2])["error"]


async def by_handshake(rig: Rig) -> dict[str, Any]:
    async with session(rig) as (wire, session_id):
        await wire.send(legacy(add("x"), session_id))
        return failure((await wire.answer())[2])


@pytest.mark.parametrize("ask", [by_name, by_door, by_handshake])
@pytest.mark.parametrize("kind", KINDS)
async def test_whoever_has_a_sandboxes_address_gets_nothing_of_a_call(
    kind: str, ask: Callable[[Rig], Awaitable[dict[str, Any]]], tmp_path: Path
) -> None:
    impostor = Impostor(KINDS[kind])
    async with impostor.listening("127.0.0.1") as endpoint, open_rig(tmp_path, tokens=TOKENS) as rig:
        await rig.routes.bind(replace(ROUTE, endpoint=endpoint))
        said = await ask(rig)
    assert (said["kind"], said["retryable"], said["trainable"]) == ("connect_failed", True, False)
    assert "did not prove" in said["message"]
    assert impostor.heard() == [QUESTION] and SECRET.encode() not in b"".join(impostor.received)


@pytest.mark.parametrize("kind", KINDS)
async def test_whoever_has_a_sandboxes_address_gets_nothing_of_a_list_or_a_claim(kind: str) -> None:
    impostor = Impostor(KINDS[kind])
    async with impostor.listening("::1") as endpoint:
        client = RunnerClient(endpoint, TOKENS, ROUTE.sandbox_id)
        asked: list[Awaitable[Any]] = [
            client.wait_ready(10),
            client.list_tools(10),
            client.claim({}, {"S": SECRET}, 10),
            client.read_file("/x", 10, 10),
            client.read_resource("x:y", 10),
        ]
        for asking in asked:
            with pytest.raises(ConnectFailed, match="did not prove"):
                await asking
    assert impostor.heard() == [QUESTION] * len(asked)


async def test_a_silent_impostor_gets_nothing_and_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PROOF_SECONDS", 0.1)
    impostor = Impostor(lambda _: b"")
    async with impostor.listening("127.0.0.1") as endpoint, open_rig(tmp_path, tokens=TOKENS) as rig:
        await rig.routes.bind(replace(ROUTE, endpoint=endpoint))
        said = await by_name(rig)
        assert (said["kind"], said["retryable"], said["trainable"]) == ("connect_failed", True, False)
        with pytest.raises(AshError) as raised:
            await RunnerClient(endpoint, TOKENS, ROUTE.sandbox_id).list_tools(10)
        assert isinstance(raised.value, ConnectFailed)
    assert impostor.heard() == [QUESTION] * 2
