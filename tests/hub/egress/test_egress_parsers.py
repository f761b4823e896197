"""The parsers of the egress proxy: what they read right, and that nothing makes them do worse than refuse."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ash_hub.egress.http import CHUNKED, chunk_size, read_answer, read_request
from ash_hub.egress.refusal import Refusal, answer
from ash_hub.egress.tls import asks_again, check_hello, read_hello
from tests.hub.egress.egress_parts import built_hello, client_hello, connect, get, server_name

RETRY = (
    bytes.fromhex("16 0303 0058 02 000054 0303")
    + bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
    + bytes(50)
)
CHANGE_CIPHER = bytes.fromhex("14 0303 0001 01")


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def refused(data: bytes) -> str:
    with pytest.raises(Refusal) as found:
        read_request(data)
    return found.value.reason


def test_the_name_that_a_real_client_asks_for_is_read() -> None:
    hello = read_hello(client_hello("www.example.com"))
    assert hello is not None and hello.server_name == "www.example.com" and not hello.encrypted
    check_hello(hello, "www.example.com")


@given(st.integers(min_value=0, max_value=10_000))
def test_a_part_of_a_hello_is_not_enough_and_no_error(cut: int) -> None:
    data = built_hello(server_name(b"example.com"), (16, bytes(300)), records=3)
    found = read_hello(data[:cut])
    assert (found is None) == (cut < len(data))


@pytest.mark.parametrize("records", [1, 2, 5, 16])
def test_a_hello_in_several_records_is_read(records: int) -> None:
    hello = read_hello(built_hello(server_name(b"example.com"), (21, bytes(200)), records=records))
    assert hello is not None and hello.server_name == "example.com"


def test_a_second_hello_after_a_cipher_change_is_read() -> None:
    first = read_hello(built_hello(server_name(b"example.com")))
    hello = read_hello(CHANGE_CIPHER + built_hello(server_name(b"example.com")), first)
    assert hello is not None and hello.server_name == "example.com"


def test_an_encrypted_hello_passes_where_it_is_allowed_if_its_open_name_is_right() -> None:
    for name, fits in ((b"example.com", True), (b"cloud.example", False)):
        hello = read_hello(built_hello(server_name(name), (0xFE0D, b"\0" * 40)))
        assert hello is not None
        if fits:
            check_hello(hello, "example.com", encrypted=True)
        else:
            with pytest.raises(Refusal):
                check_hello(hello, "example.com", encrypted=True)


def first_record(data: bytes) -> bytes:
    return data[: 5 + int.from_bytes(data[3:5])]


def hello_reason(data: bytes, name: str = "example.com") -> str:
    with pytest.raises(Refusal) as found:
        hello = read_hello(data)
        assert hello is not None
        check_hello(hello, name)
    return found.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (built_hello(server_name(b"evil.org")), "server_name"),
        (built_hello(server_name(b"example.com.")), "server_name"),
        (built_hello(server_name(b"sub.example.com")), "server_name"),
        (client_hello(None), "no_server_name"),
        (built_hello(), "no_server_name"),
        (built_hello(server_name(b"example.com"), (0xFE0D, b"\0" * 40)), "encrypted_hello"),
        (built_hello(server_name(b"example.com"), (0xFFCE, b"\0" * 40)), "encrypted_hello"),
        (built_hello(server_name(b"example.com"), server_name(b"evil.org")), "not_tls"),
        (built_hello(server_name(b"example.com", b"evil.org")), "not_tls"),
        (built_hello(server_name()), "not_tls"),
        (built_hello(server_name(b"example.com", kind=1)), "not_tls"),
        (built_hello(server_name("exämple.com".encode())), "not_tls"),
        (built_hello(server_name(b"example.com"), records=17), "not_tls"),
        (first_record(built_hello(server_name(b"example.com"), records=2)) + b"\x17\x03\x03\0\1x", "not_tls"),
        (first_record(built_hello(server_name(b"example.com"), records=2)) + CHANGE_CIPHER, "not_tls"),
        (b"GET / HTTP/1.1\r\n", "not_tls"),
        (b"SSH-2.0-x\r\n", "not_tls"),
        (b"\x16\x02\x00", "not_tls"),
        (b"\x16\x03\x01\x00\x00", "not_tls"),
        (b"\x16\x03\x01\xff\xff", "not_tls"),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "not_tls"),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "not_tls"),
        (CHANGE_CIPHER * 17, "not_tls"),
    ],
)
def test_an_unclear_hello_is_refused(data: bytes, reason: str) -> None:
    assert hello_reason(data) == reason


@given(st.binary(max_size=400) | st.binary(max_size=200).map(lambda data: b"\x16\x03\x01\x00\xc8\x01" + data))
def test_no_bytes_make_the_reading_of_a_hello_fail_otherwise(data: bytes) -> None:
    try:
        read_hello(data)
    except Refusal as refusal:
        assert refusal.reason == "not_tls"


@given(st.integers(min_value=0, max_value=300), st.integers(min_value=0, max_value=255))
def test_a_changed_byte_never_changes_the_name_unseen(at: int, value: int) -> None:
    good = bytearray(built_hello(server_name(b"example.com"), (16, bytes(40))))
    good[at % len(good)] = value
    try:
        hello = read_hello(bytes(good))
    except Refusal:
        return
    assert hello is None or hello.server_name is None or len(hello.server_name) == len("example.com")


def test_a_server_that_asks_for_a_second_hello_is_recognised() -> None:
    assert asks_again(RETRY) is True
    assert asks_again(RETRY[:-60]) is None
    assert asks_again(RETRY.replace(b"\xcf\x21", b"\xcf\x22")) is False
    assert asks_again(b"\x15\x03\x03\x00\x02\x02\x28") is False


def test_a_request_is_written_anew_without_what_is_for_the_proxy() -> None:
    request = read_request(
        head(
            "POST http://Example.com/a?b=c HTTP/1.1",
            "Host: example.COM:80",
            "Proxy-Authorization: Basic c2VjcmV0",
            "Proxy-Connection: keep-alive",
            "Connection: X-Private, close",
            "X-Private: 1",
            "Keep-Alive: timeout=5",
            "TE: trailers",
            "Upgrade: websocket",
            "X-Kept:  a b\t",
            "Content-Length: 3",
        )
    )
    assert request.head() == head(
        "POST /a?b=c HTTP/1.1", "Host: example.com", "X-Kept: a b", "Content-Length: 3", "Connection: close"
    )


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("http://example.com", "GET / HTTP/1.1"),
        ("HTTP://example.com?x=1", "GET /?x=1 HTTP/1.1"),
        ("http://example.com:80//a/../b", "GET //a/../b HTTP/1.1"),
    ],
)
def test_an_absolute_address_becomes_a_path(url: str, line: str) -> None:
    assert read_request(get(url, host="example.com")).head().startswith(line.encode() + b"\r\n")


def test_a_port_and_brackets_stay_in_the_host() -> None:
    assert b"Host: [2606:4700::1111]:8080\r\n" in read_request(get("http://[2606:4700::1111]:8080/")).head()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (get("http://example.com/", host="evil.org"), "host"),
        (get("http://example.com/", host="example.com:8080"), "host"),
        (get("http://example.com:8080/", host="example.com"), "host"),
        (get("http://example.com/", host=""), "host"),
        (head("GET http://example.com/ HTTP/1.1"), "bad_request"),
        (get("http://example.com/", "Host: example.com"), "bad_request"),
        (head("GET / HTTP/1.1", "Host: example.com"), "bad_request"),
        (head("GET //example.com/ HTTP/1.1", "Host: example.com"), "bad_request"),
        (head("GET * HTTP/1.1", "Host: example.com"), "bad_request"),
        (get("https://example.com/"), "scheme"),
        (get("ftp://example.com/"), "scheme"),
        (get("file:///etc/passwd", host="x"), "scheme"),
        (get("http://example.com/#x"), "bad_request"),
        (get("http://user:pw@example.com/", host="example.com"), "userinfo"),
        (get("http://example.com@127.0.0.1/", host="127.0.0.1"), "userinfo"),
        (get("http://example.com\\@127.0.0.1/", host="127.0.0.1"), "userinfo"),
        (get("http://2130706433/"), "odd_address"),
        (get("http:///x", host="x"), "odd_name"),
        (get("http://example.com:/"), "odd_port"),
        (connect("example.com"), "odd_port"),
        (head("CONNECT example.com:443 HTTP/1.1", "Host: evil.org:443"), "host"),
        (head("CONNECT http://example.com:443 HTTP/1.1"), "odd_name"),
        (head("CONNECT example.com:443 HTTP/1.1", "content-length: 5"), "bad_request"),
        (head("CONNECT example.com:443 HTTP/1.1", "transfer-encoding: chunked"), "bad_request"),
        (head("GET http://example.com/ HTTP/2.0", "Host: example.com"), "bad_request"),
        (head("GET  http://example.com/ HTTP/1.1", "Host: example.com"), "bad_request"),
        (head("GET http://example.com/ HTTP/1.1 ", "Host: example.com"), "bad_request"),
        (get("http://example.com/", "X : 1"), "bad_request"),
        (get("http://example.com/", " folded"), "bad_request"),
        (get("http://example.com/", "X: a\nHost: evil.org"), "bad_request"),
        (get("http://example.com/", "X: a\rb"), "bad_request"),
        (get("http://example.com/", "X: a\0b"), "bad_request"),
        (get("http://example.com/", *["X: 1"] * 300), "bad_request"),
        (get("http://example.com/", "Content-Length: 1", "Content-Length: 1"), "bad_request"),
        (get("http://example.com/", "Content-Length: 1, 1"), "bad_request"),
        (get("http://example.com/", "Content-Length: +1"), "bad_request"),
        (get("http://example.com/", "Content-Length: 1", "Transfer-Encoding: chunked"), "bad_request"),
        (get("http://example.com/", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), "bad_request"),
        (get("http://example.com/", "Transfer-Encoding: gzip, chunked"), "bad_request"),
        (get("http://example.com/", "Transfer-Encoding: \x0bchunked"), "bad_request"),
        (head("GET http://e.com/ HTTP/1.0", "Host: e.com", "Transfer-Encoding: chunked"), "bad_request"),
    ],
)
def test_an_ambiguous_request_is_refused(data: bytes, reason: str) -> None:
    assert refused(data) == reason


def test_a_tunnel_needs_no_host_and_takes_one_without_a_port() -> None:
    for line in ((), ("Host: example.com",), ("Host: EXAMPLE.com:443",)):
        request = read_request(head("CONNECT example.com:443 HTTP/1.1", *line))
        assert request.tunnel and str(request.target) == "example.com:443"


@given(st.binary(max_size=300))
@example(b"GET http://a.b/ HTTP/1.1\r\nHost:a.b\r\nX:" + b" " * 30_000 + b"\x01\r\n\r\n")
@example(b"GET http://a.b/ HTTP/1.1\r\n" + b"A" * 30_000 + b"\r\n\r\n")
def test_no_bytes_make_the_reading_of_a_head_fail_otherwise(data: bytes) -> None:
    for whole in (data, data + b"\r\n\r\n", b"GET http://a.b/ HTTP/1.1\r\nHost: a.b\r\n" + data + b"\r\n\r\n"):
        try:
            request = read_request(whole)
        except Refusal:
            continue
        if not request.tunnel:
            again = request.head()
            assert again.endswith(b"\r\n\r\n") and again.count(b"\r\n\r\n") == 1
            assert again.lower().count(b"\r\nhost: ") == 1 and again.count(b"\r\nConnection: ") == 1


@given(st.binary(max_size=40))
def test_no_bytes_make_the_reading_of_a_chunk_fail_otherwise(data: bytes) -> None:
    for line in (data, data + b"\r\n"):
        try:
            assert chunk_size(line) >= 0
        except Refusal as refusal:
            assert refusal.reason == "bad_request"


@pytest.mark.parametrize("line", [b"\r\n", b"-1\r\n", b"0x5\r\n", b"5\n", b"5 5\r\n", b"f" * 16 + b"\r\n", b"+5\r\n"])
def test_an_odd_chunk_size_is_refused(line: bytes) -> None:
    with pytest.raises(Refusal):
        chunk_size(line)


def test_a_chunk_size_is_read_past_its_extensions() -> None:
    assert chunk_size(b"1aF;name=value\r\n") == 0x1AF
    assert read_request(get("http://a.b/", "Transfer-Encoding: Chunked")).length == CHUNKED


def test_an_answer_says_that_the_connection_ends_and_keeps_its_coding() -> None:
    found = read_answer(
        head(
            "HTTP/1.1 200 Fine",
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "Transfer-Encoding: chunked",
            "X: y",
            "Ash-Egress: refused",
        )
    )
    assert found.head == head("HTTP/1.1 200 Fine", "X: y", "Transfer-Encoding: chunked", "Connection: close")
    assert found.length is None


@pytest.mark.parametrize("data", [b"SSH-2.0\r\n\r\n", head("HTTP/1.1 101 Switching"), head("HTTP/2 200"), b"\r\n\r\n"])
def test_an_answer_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(Refusal) as found:
        read_answer(data)
    assert found.value.reason == "bad_answer" and found.value.verdict == "failed"


@given(st.text(max_size=300))
def test_a_refusal_is_one_well_formed_answer_whatever_the_policy_is_called(policy: str) -> None:
    data = answer(Refusal("not_listed", "no"), policy=policy, target="a.b:80")
    first, _, body = data.partition(b"\r\n\r\n")
    lines = first.split(b"\r\n")
    assert lines[0].startswith(b"HTTP/1.1 403 Forbidden (egress refused: not_listed; policy: ")
    assert lines[1] == b"Ash-Egress: refused; reason=not_listed" and len(lines) == 5
    assert lines[3] == b"Content-Length: %d" % len(body)
