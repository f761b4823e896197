"""The egress proxy on real sockets: what it lets through, what it refuses, and how it says so."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest

from ash_hub.egress.limits import Limits
from ash_hub.egress.tls import ALERT
from ash_recipes.runner.forwarder import forwarding
from tests.hub.egress.egress_parts import (
    OK,
    WAIT_SECONDS,
    Names,
    Wires,
    ask,
    built_hello,
    certified,
    client_hello,
    connect,
    echo,
    error_of,
    get,
    proxying,
    server_name,
    silent,
    web_server,
)

pytestmark = pytest.mark.anyio

PUBLIC = "93.184.216.34"
RETRY = (
    bytes.fromhex("16 0303 0058 02 000054 0303")
    + bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
    + bytes(50)
)


async def test_a_web_client_reaches_a_server_that_the_policy_names() -> None:
    async with web_server() as (port, heads), proxying([f"127.0.0.1:{port}"]) as it, forwarding(it.path, port=0) as at:
        async with httpx.AsyncClient(proxy=f"http://127.0.0.1:{at}") as client:
            for _ in range(2):
                answer = await client.post(f"http://127.0.0.1:{port}/a?b", content=b"body", headers={"X-Me": "1"})
                assert answer.status_code == 200 and answer.text == "ok"
    assert heads[0].startswith(b"POST /a?b HTTP/1.1\r\n") and b"X-Me: 1" in heads[0]
    assert b"proxy" not in heads[0].lower() and b"Connection: close" in heads[0]
    assert {name: value for name, value in it.records[0].items() if name != "time"} == {
        "sandbox": "sbx-test",
        "decision": "allowed",
        "reason": "policy",
        "message": f"allowed by the policy 127.0.0.1:{port}",
        "method": "POST",
        "target": f"127.0.0.1:{port}",
        "address": "127.0.0.1",
    }


async def test_a_web_client_speaks_tls_to_a_name_through_a_tunnel() -> None:
    server, trusting = certified("api.test")
    async with web_server(tls=server) as (port, heads), proxying([f"api.test=127.0.0.1:{port}"]) as it:
        async with forwarding(it.path, port=0) as at:
            async with httpx.AsyncClient(proxy=f"http://127.0.0.1:{at}", verify=trusting) as client:
                answer = await client.get(f"https://api.test:{port}/")
    assert answer.text == "ok" and len(heads) == 1
    assert it.reasons() == [("allowed", "policy")]


async def test_a_refused_tunnel_tells_an_ordinary_client_which_policy_refused_it() -> None:
    async with proxying(["example.com"]) as it, forwarding(it.path, port=0) as at:
        async with httpx.AsyncClient(proxy=f"http://127.0.0.1:{at}") as client:
            with pytest.raises(httpx.ProxyError, match=r"403 Forbidden .*not_listed; policy: example\.com"):
                await client.get("https://evil.org/")


async def test_a_refusal_names_policy_and_reason() -> None:
    async with proxying(["example.com"]) as it:
        error = error_of(await ask(it.path, get("http://evil.org/")))
    assert error["reason"] == "not_listed" and error["policy"] == "example.com" and error["target"] == "evil.org:80"
    assert it.reasons() == [("refused", "not_listed")]


async def test_a_name_off_the_list_is_never_resolved() -> None:
    names = Names({"evil.org": [[PUBLIC]]})
    async with proxying(["example.com", "*.example.org"], names=names) as it:
        for data in (get("http://evil.org/"), connect("secret-data.evil.org:443"), connect("example.com:22")):
            assert error_of(await ask(it.path, data))["kind"] == "egress_refused"
    assert names.asked == []


async def test_a_name_is_resolved_once_and_the_checked_address_is_the_one_dialled() -> None:
    names, wires = Names({"rebind.example": [[PUBLIC], ["127.0.0.1"]]}), Wires(echo)
    async with proxying("internet", names=names, dialling=wires) as it:
        async with asyncio.timeout(WAIT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(it.path)
            writer.write(connect("rebind.example:443"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            writer.close()
        assert wires.dialled == [f"{PUBLIC} 443"] and names.asked == [("rebind.example", False)]
        # The name now stands for loopback: a new request is a new decision.
        assert error_of(await ask(it.path, connect("rebind.example:443")))["reason"] == "loopback"
    assert wires.dialled == [f"{PUBLIC} 443"]


async def test_of_several_addresses_only_those_that_pass_are_dialled() -> None:
    names = Names({"mixed.example": [["127.0.0.1", "10.0.0.1", PUBLIC, "169.254.169.254"]]})
    wires = Wires()
    async with proxying("internet", names=names, dialling=wires) as it:
        error = error_of(await ask(it.path, get("http://mixed.example/")))
    assert error["kind"] == "egress_failed" and error["reason"] == "unreachable"
    assert wires.dialled == [f"{PUBLIC} 80"]


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1.", "[::1]", "[::ffff:127.0.0.1]"),
        *("169.254.169.254", "[fd00:ec2::254]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "0.0.0.0", "[::]"),
        *("10.0.0.1", "[::127.0.0.1]", "[fe80::1%25eth0]", "localhost", "to-loopback.example", "to-metadata.example"),
        *("to-host.example", "me@127.0.0.1"),
    ],
)
async def test_the_internet_has_no_way_to_what_is_not_public(target: str) -> None:
    names = Names(
        {
            "localhost": [["127.0.0.1"]],
            "to-loopback.example": [["127.0.0.1", "::1"]],
            "to-metadata.example": [["169.254.169.254"]],
            "to-host.example": [["192.0.2.2"]],
        }
    )
    wires = Wires(echo)
    async with proxying("internet", names=names, dialling=wires) as it:
        for data in (get(f"http://{target}/"), connect(f"{target}:443")):
            assert error_of(await ask(it.path, data))["kind"] == "egress_refused"
    assert wires.dialled == []
    assert [decision for decision, _ in it.reasons()] == ["refused", "refused"]


async def test_a_connection_that_ends_on_this_host_after_all_is_given_up() -> None:
    async with web_server() as (port, heads):

        async def astray(address: object, _: int) -> socket.socket:
            return await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port))

        names = Names({"odd.example": [[PUBLIC]]})
        async with proxying("internet", names=names, dialling=astray) as it:
            error = error_of(await ask(it.path, get("http://odd.example/")))
    assert error["reason"] == "this_host" and heads == []


async def test_a_redirect_is_only_an_answer_and_the_next_request_is_decided_anew() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/latest/\r\nContent-Length: 0\r\n\r\n"
    async with web_server(answer) as (port, _), proxying([f"127.0.0.1:{port}"]) as it:
        async with forwarding(it.path, port=0) as at:
            async with httpx.AsyncClient(proxy=f"http://127.0.0.1:{at}", follow_redirects=True) as client:
                last = await client.get(f"http://127.0.0.1:{port}/")
    assert last.status_code == 403 and last.headers["ash-egress"] == "refused; reason=not_listed"
    assert it.reasons() == [("allowed", "policy"), ("refused", "not_listed")]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (client_hello("evil.org"), "server_name"),
        (client_hello(None), "no_server_name"),
        (built_hello(server_name(b"example.com"), (0xFE0D, b"\0" * 9)), "encrypted_hello"),
        (b"GET / HTTP/1.1\r\nHost: evil.org\r\n\r\n", "not_tls"),
    ],
)
async def test_a_tunnel_to_a_domain_carries_only_tls_for_that_domain(first: bytes, reason: str) -> None:
    heard: list[bytes] = []

    async def listen(connection: socket.socket) -> None:
        with suppress(OSError):
            while data := await asyncio.get_running_loop().sock_recv(connection, 65_536):
                heard.append(data)

    names = Names({"example.com": [[PUBLIC]]})
    async with proxying(["example.com"], names=names, dialling=Wires(listen)) as it:
        answer = await ask(it.path, connect("example.com:443"), then=first)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(ALERT)
    assert heard == [] and it.reasons() == [("refused", reason)]


async def test_a_client_that_says_nothing_in_a_tunnel_is_not_waited_for() -> None:
    names, limits = Names({"example.com": [[PUBLIC]]}), Limits(head_seconds=0.05)
    async with proxying(["example.com"], names=names, dialling=Wires(silent), limits=limits) as it:
        async with asyncio.timeout(WAIT_SECONDS):
            while not (answer := await ask(it.path, connect("example.com:443"))).endswith(ALERT):
                assert error_of(answer)["reason"] == "slow_request"  # on a busy machine even its head is late
    assert it.reasons()[-1] == ("refused", "not_tls")


@pytest.mark.parametrize(("second", "reasons"), [(b"example.com", []), (b"evil.org", [("refused", "server_name")])])
async def test_a_second_hello_is_checked_like_the_first(second: bytes, reasons: list[tuple[str, str]]) -> None:
    first, again = built_hello(server_name(b"example.com")), built_hello(server_name(second))
    heard = bytearray()

    async def retrying(connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while len(heard) < len(first):
            heard.extend(await loop.sock_recv(connection, 65_536))
        await loop.sock_sendall(connection, RETRY)
        while data := await loop.sock_recv(connection, 65_536):
            heard.extend(data)
            await loop.sock_sendall(connection, b"done")

    names = Names({"example.com": [[PUBLIC]]})
    async with proxying(["example.com"], names=names, dialling=Wires(retrying)) as it:
        async with asyncio.timeout(WAIT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(it.path)
            writer.write(connect("example.com:443") + first)
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(RETRY)) == RETRY
            writer.write(again)
            assert await reader.read(100) == (ALERT if reasons else b"done")
            writer.close()
            await writer.wait_closed()
    assert bytes(heard) == (first if reasons else first + again)
    assert it.reasons() == (reasons or [("allowed", "policy")])


async def test_a_body_in_chunks_is_framed_anew_and_its_trailers_end_here() -> None:
    names, wires = Names({"example.com": [[PUBLIC]]}), Wires(echo)
    body = b"3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nHost: evil.org\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"
    heard = asyncio.get_running_loop().create_future()

    async def until_whole(connection: socket.socket) -> None:
        loop, data = asyncio.get_running_loop(), b""
        while not data.endswith(b"0\r\n\r\n"):
            data += await loop.sock_recv(connection, 65_536)
        heard.set_result(data)
        await loop.sock_sendall(connection, OK)

    wires = replace(wires, server=until_whole)
    async with proxying("internet", names=names, dialling=wires) as it:
        request = get("http://example.com/", "Transfer-Encoding: chunked").replace(b"GET", b"POST", 1)
        answer = await ask(it.path, request + body)
    assert answer.endswith(b"\r\n\r\nok")
    got = await heard
    assert got.endswith(b"\r\n\r\n3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n")
    assert b"smuggled" not in got and b"evil" not in got


async def test_what_follows_a_request_is_not_read_as_another() -> None:
    async with web_server() as (port, heads), proxying([f"127.0.0.1:{port}"]) as it:
        url = f"http://127.0.0.1:{port}/"
        answer = await ask(it.path, get(url) + get(url))
    assert answer.count(b"HTTP/1.1 200") == 1 and b"Connection: close" in answer
    assert len(heads) == 1 and len(it.records) == 1


async def test_a_broken_body_is_refused_and_an_early_answer_still_arrives() -> None:
    names = Names({"example.com": [[PUBLIC]]})
    post = get("http://example.com/", "Transfer-Encoding: chunked").replace(b"GET", b"POST", 1)

    async def hasty(connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_recv(connection, 65_536)
        await loop.sock_sendall(connection, OK)

    async with proxying("internet", names=names, dialling=Wires(silent)) as it:
        assert error_of(await ask(it.path, post + b"zz\r\n"))["reason"] == "bad_request"
    async with proxying("internet", names=names, dialling=Wires(hasty)) as it:
        assert (await ask(it.path, post + b"5\r\nab")).endswith(b"ok")


async def test_an_answer_that_is_none_is_the_way_out_that_failed() -> None:
    async with web_server(b"SSH-2.0-OpenSSH\r\n") as (port, _), proxying([f"127.0.0.1:{port}"]) as it:
        error = error_of(await ask(it.path, get(f"http://127.0.0.1:{port}/")))
    assert error["kind"] == "egress_failed" and error["reason"] == "bad_answer"


async def test_a_name_without_an_address_is_a_failure_and_no_refusal() -> None:
    async with proxying("internet", names=Names({"empty.example": [[]]})) as it:
        for name in ("empty.example", "nowhere.example"):
            error = error_of(await ask(it.path, get(f"http://{name}/")))
            assert error["kind"] == "egress_failed" and error["reason"] == "unresolved"


async def test_a_large_body_passes_unchanged_both_ways() -> None:
    names, data = Names({"example.com": [[PUBLIC]]}), bytes(range(256)) * 16_384
    async with proxying("internet", names=names, dialling=Wires(echo)) as it, forwarding(it.path, port=0) as at:
        async with asyncio.timeout(WAIT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", at)
            writer.write(connect("example.com:443"))
            await reader.readuntil(b"\r\n\r\n")
            writer.write(data)
            writer.write_eof()
            assert await reader.read(-1) == data
            writer.close()
            await writer.wait_closed()


async def test_a_proxy_that_is_away_ends_the_forwarded_connection() -> None:
    async with forwarding("/nowhere/proxy.sock", port=0) as at, asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", at)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


async def test_a_certificate_for_another_name_is_the_client_s_to_refuse() -> None:
    server, trusting = certified("other.test")
    async with web_server(tls=server) as (port, _), proxying([f"api.test=127.0.0.1:{port}"]) as it:
        async with forwarding(it.path, port=0) as at:
            async with httpx.AsyncClient(proxy=f"http://127.0.0.1:{at}", verify=trusting) as client:
                with pytest.raises(httpx.ConnectError, match="Hostname mismatch"):
                    await client.get(f"https://api.test:{port}/")
