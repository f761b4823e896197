"""Parts of the tests of the egress proxy: one sandbox's proxy on a real socket, and servers to reach through it."""

from __future__ import annotations

import asyncio
import datetime
import json
import socket
import ssl
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ash_hub.egress.addresses import Surroundings
from ash_hub.egress.audit import Audit, Record
from ash_hub.egress.capacity import Capacity
from ash_hub.egress.exchange import OuterNetwork
from ash_hub.egress.lease import Lease
from ash_hub.egress.limits import Limits
from ash_hub.egress.names import Address
from ash_hub.egress.policy import Policy
from ash_hub.egress.proxy import SandboxProxy
from ash_hub.egress.resolver import Resolve, dial

WAIT_SECONDS = 30.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Names:
    """A resolver with a script: each question takes the next answer, the last one again and again."""

    answers: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict[str, Sequence[Sequence[str]]])
    asked: list[tuple[str, bool]] = field(default_factory=list[tuple[str, bool]])

    async def __call__(self, name: str, *, as_host_does: bool) -> Sequence[Address]:
        before = sum(asked == name for asked, _ in self.asked)
        self.asked.append((name, as_host_does))
        if name not in self.answers:
            raise OSError("no such name")
        script = self.answers[name]
        return [ip_address(text) for text in script[min(before, len(script) - 1)]]


@dataclass
class Wires:
    """Connects to `server` whatever address is dialled, without a network, and notes the address."""

    server: Callable[[socket.socket], Awaitable[None]] | None = None
    dialled: list[str] = field(default_factory=list[str])
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    async def __call__(self, address: Address, port: int) -> socket.socket:
        self.dialled.append(f"{address} {port}")
        if self.server is None:
            raise ConnectionRefusedError
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        self.tasks.append(asyncio.ensure_future(_run(self.server, theirs)))
        return ours


async def _run(server: Callable[[socket.socket], Awaitable[None]], connection: socket.socket) -> None:
    with connection:
        await server(connection)


async def echo(connection: socket.socket) -> None:
    """Say back what comes."""
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while data := await loop.sock_recv(connection, 65_536):
            await loop.sock_sendall(connection, data)


async def silent(connection: socket.socket) -> None:
    """Read, and never answer."""
    with suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(connection, 65_536):
            pass


@dataclass
class Proxy:
    path: str
    proxy: SandboxProxy
    records: list[Record]

    def reasons(self) -> list[tuple[str, str]]:
        return [(record["decision"], record["reason"]) for record in self.records]


@asynccontextmanager
async def proxying(
    policy: str | Sequence[str],
    *,
    names: Resolve | None = None,
    dialling: Any = dial,
    limits: Limits | None = None,
    surroundings: Surroundings | None = None,
    lease: Lease | None = None,
) -> AsyncGenerator[Proxy]:
    """Run one sandbox's proxy on a Unix socket; nothing leaves this machine."""
    records: list[Record] = []

    def keep(record: Record) -> bool:
        records.append(record)
        return True

    with tempfile.TemporaryDirectory(prefix="eg-") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(directory, "proxy.sock"))
        listener.bind(path)
        listener.listen()
        known = surroundings or Surroundings()
        outside = OuterNetwork(names or Names(), dialling, lambda: known, Capacity(256), Capacity(1024))
        audit = Audit(keep, sandbox="sbx-test")
        proxy = SandboxProxy(Policy.parse(policy), limits or Limits(), outside, audit, lease)
        serving = asyncio.create_task(proxy.serve(listener))
        try:
            yield Proxy(path, proxy, records)
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving
            if isinstance(dialling, Wires):
                for task in dialling.tasks:
                    task.cancel()
                    with suppress(asyncio.CancelledError, OSError):
                        await task


async def ask(path: str, request: bytes, *, then: bytes = b"") -> bytes:
    """Send bytes and return all that comes back; `then` is sent after the first answer has begun."""
    async with asyncio.timeout(WAIT_SECONDS):
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(request)
            got = b""
            if then:
                got = await reader.readuntil(b"\r\n\r\n")
                writer.write(then)
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    got += data
            return got
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def error_of(answer: bytes) -> dict[str, Any]:
    """Return the body of a refusal, having checked its head."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error: dict[str, Any] = json.loads(body)["error"]
    assert f"Ash-Egress: {error['kind'].removeprefix('egress_')}; reason={error['reason']}".encode() in head
    assert b"Connection: close" in head and f"Content-Length: {len(body)}".encode() in head
    return error


def get(url: str, *headers: str, host: str | None = None) -> bytes:
    """Return a GET as one sends it to a proxy."""
    named = host if host is not None else url.split("/")[2]
    return "\r\n".join([f"GET {url} HTTP/1.1", f"Host: {named}", *headers, "", ""]).encode("latin-1")


def connect(target: str) -> bytes:
    return f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("latin-1")


@asynccontextmanager
async def web_server(
    answer: bytes = OK, *, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[tuple[int, list[bytes]]]:
    """Serve the same answer to everybody on loopback; yield the port and the heads that came."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()
        await server.wait_closed()


def certified(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context with a certificate for `name`, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pem + secret)
        file.flush()
        server.load_cert_chain(file.name)
    client.load_verify_locations(cadata=pem.decode("ascii"))
    return server, client


def client_hello(name: str | None) -> bytes:
    """Return what OpenSSL sends first to ask for `name`."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    talk = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        talk.do_handshake()
    return outgoing.read()


def built_hello(*extensions: tuple[int, bytes], records: int = 1) -> bytes:
    """Return a ClientHello with exactly these extensions, spread over so many records."""
    listed = b"".join(kind.to_bytes(2) + len(data).to_bytes(2) + data for kind, data in extensions)
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0" + len(listed).to_bytes(2) + listed
    message = b"\x01" + len(body).to_bytes(3) + body
    step = -(-len(message) // records)
    pieces = [message[at : at + step] for at in range(0, len(message), step)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces)


def server_name(*names: bytes, kind: int = 0) -> tuple[int, bytes]:
    """Return the extension that asks for a server."""
    listed = b"".join(bytes([kind]) + len(name).to_bytes(2) + name for name in names)
    return 0, len(listed).to_bytes(2) + listed
