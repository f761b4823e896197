"""Attempts to reach what no sandbox may reach, through the egress proxy, from one that may go out."""

from __future__ import annotations

from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["WAYS_OUT"]

_ASK = """
def send(head):
    proxy = socket.socket(socket.AF_UNIX)
    proxy.settimeout(10)
    proxy.connect(bound)
    proxy.sendall(head.replace("PORT", str(bait["port"])).encode() + b"\\r\\n\\r\\n")
    return proxy.recv(65536).decode(errors="replace")
def ask(head):
    answer = send(head)
    status = answer.split(" ")[1]
    if status == "200": return escaped(answer.splitlines()[0])
    return answer.split("\\r\\n\\r\\n")[-1][:200] or status
"""

_FOLLOW = """
def follow(url):
    answer = send(f"GET http://door.test:PORT/to?{url} HTTP/1.1\\r\\nHost: door.test:PORT")
    if bait["secret"] in answer: escaped("the proxy followed it")
    (url,) = [line[10:] for line in answer.splitlines() if line.startswith("Location: ")]
    return ask(f"GET {url} HTTP/1.1\\r\\nHost: {url.split('/')[2]}")
"""


def _way(name: str, tries: str, *heads: str, stopped_by: str) -> Attempt:
    lines = [f"why = ask({head!r})" for head in heads]
    return Attempt(
        name=f"egress: {name}",
        tries=tries,
        script="\n".join((_ASK, *lines, "stopped(why)")),
        stopped_by=(stopped_by,),
        bound=_BOUND,
        network="internet",
    )


_SECOND_HELLO = """
def vector(width, data): return len(data).to_bytes(width, "big") + data
name = vector(2, b"\\0" + vector(2, b"door.test"))
body = b"\\3\\3" + b"r" * 32 + b"\\0" + vector(2, b"\\x13\\1") + vector(1, b"\\0")
body += vector(2, b"\\0\\0" + vector(2, name))
hello = b"\\x16\\3\\1" + vector(2, b"\\1" + vector(3, body))
tunnel = socket.socket(socket.AF_UNIX)
tunnel.connect(bound)
tunnel.sendall(f"CONNECT door.test:{bait['port']} HTTP/1.1\\r\\n\\r\\n".encode())
said = tunnel.recv(65536)
if b" 200 " not in said: absent("no tunnel was opened")
# What listens there speaks HTTP: it answers the first line that ends, and the first hello has no end of a line.
assert b"\\n" not in hello
tunnel.sendall(hello + b"\\x16\\3\\1\\0\\x0a\\1\\0\\r\\n\\r\\n")
tunnel.settimeout(2)
try: said = tunnel.recv(65536)
except TimeoutError: stopped("the server got the first hello alone")
escaped("the server answered what follows") if b"400" in said else stopped(f"the tunnel ended: {said!r}")
"""

_BOUND = "egress_proxy"
_POLICY, _FORMS = "egress policy", "egress: one form of an address"

WAYS_OUT = (
    _way(
        "loopback",
        "asks the proxy for a port of the host's loopback",
        "CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: 127.0.0.1:PORT",
        "GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT",
        stopped_by=_POLICY,
    ),
    _way(
        "loopback on an allowed port",
        "asks for loopback and every address on ports that are open",
        "GET http://127.0.0.1/ HTTP/1.1\r\nHost: 127.0.0.1",
        "GET http://0.0.0.0/ HTTP/1.1\r\nHost: 0.0.0.0",
        "CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443",
        stopped_by=_POLICY,
    ),
    _way(
        "metadata",
        "asks for the cloud's metadata by address",
        "GET http://169.254.169.254/latest/meta-data/ HTTP/1.1\r\nHost: 169.254.169.254",
        "GET http://[fd00:ec2::254]/latest/meta-data/ HTTP/1.1\r\nHost: [fd00:ec2::254]",
        stopped_by=_POLICY,
    ),
    _way(
        "loopback by name",
        "asks for names that mean this host",
        "GET http://localhost:PORT/ HTTP/1.1\r\nHost: localhost:PORT",
        "GET http://localhost/ HTTP/1.1\r\nHost: localhost",
        "GET http://ip6-localhost/ HTTP/1.1\r\nHost: ip6-localhost",
        stopped_by=_POLICY,
    ),
    _way(
        "odd forms",
        "writes loopback as a number, in hexadecimal, in octal, short, mapped, and with a zone",
        *(
            f"GET http://{host}/ HTTP/1.1\r\nHost: {host}"
            for host in (
                "2130706433",
                "0x7f.1",
                "0177.0.0.1",
                "127.1",
                "[::ffff:127.0.0.1]",
                "[::1%25lo]",
                "127.0.0.1.",
            )
        ),
        stopped_by=_FORMS,
    ),
    _way(
        "two hosts",
        "names one host in the request line and another in the header",
        "GET http://127.0.0.1/ HTTP/1.1\r\nHost: example.com",
        "GET http://example.com@127.0.0.1/ HTTP/1.1\r\nHost: example.com",
        "GET / HTTP/1.1\r\nHost: 127.0.0.1",
        stopped_by=_FORMS,
    ),
    Attempt(
        name="egress: redirect",
        tries="is sent on to loopback and the cloud's metadata by a page that it may read",
        script=_ASK
        + _FOLLOW
        + """
why = follow("http://127.0.0.1:PORT/")
why = follow("http://localhost:PORT/")
why = follow("http://169.254.169.254/latest/meta-data/")
stopped(why)""",
        stopped_by=(_POLICY,),
        bound=_BOUND,
        # localhost is listed by its name only, so what stops it is the address that it turns out to have
        network=("door.test=127.0.0.1:PORT", "localhost:PORT"),
    ),
    Attempt(
        name="egress: second hello",
        tries="sends the beginning of a second TLS hello, whose name nobody has read, together with the first",
        script=_SECOND_HELLO,
        stopped_by=("egress: nothing unread before the server answers",),
        bound=_BOUND,
        network=("door.test=127.0.0.1:PORT",),
    ),
    Attempt(
        name="egress: no policy",
        tries="looks for the proxy's socket although it may not go out",
        script="s = socket.socket(socket.AF_UNIX); s.connect(bound); escaped('it answers')",
        stopped_by=("no proxy without a policy",),
        bound=_BOUND,
    ),
)
