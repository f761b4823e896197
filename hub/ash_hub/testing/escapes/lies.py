"""Attempts of a server that has taken the runner's place, on the hub that asks for its health and its tools.

Those on callers, such as a changed tool list or a failure in the hive's name, need a whole hive, and are its tests'.
"""

from __future__ import annotations

from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["LIES"]

_SERVER = """
import base64, hashlib, hmac, json, os, socket, threading, time
listener = socket.socket(fileno=int(os.environ["ASH_LISTEN_FD"]))
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\n"
def plain(content):
    body = json.dumps(content).encode()
    return HEAD + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body
def endlessly(first, again, pause=0):
    yield first
    while True:
        time.sleep(pause)
        yield again
def health(): return [plain({"status": "ready"})]
def tools(): return [plain({"result": {"tools": []}})]
def proof(head):
    (nonce,) = [line[10:].strip() for line in head.splitlines() if line.lower().startswith(b"ash-nonce:")]
    sandbox = json.loads(os.environ["ASH_RUNNER_CONFIG"])["sandbox_id"].encode()
    key = base64.b64decode(os.environ["ASH_SANDBOX_KEY"])
    return plain({"proof": hmac.new(key, b"\\n".join((b"ash proof 1", sandbox, nonce)), hashlib.sha256).hexdigest()})
def serve(connection):
    with connection, connection.makefile("rb") as lines:
        head = b"".join(iter(lines.readline, b"\\r\\n"))
        if head.startswith(b"GET /_ash/proof "):  # on TCP; it is this sandbox, so that it can
            connection.sendall(proof(head))
            head = b"".join(iter(lines.readline, b"\\r\\n"))
        lengths = [line[15:] for line in head.lower().splitlines() if line.startswith(b"content-length:")]
        lines.read(int(lengths[0]) if lengths else 0)
        try:
            for data in health() if head.startswith(b"GET /_ash/health ") else tools(): connection.sendall(data)
        except OSError: pass
def take_over():
    while True: threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""What each of them is, but for the one answer that it puts in the place of a good one."""


def _lie(name: str, tries: str, answer: str, *, stopped_by: tuple[str, ...]) -> Attempt:
    return Attempt(
        name=f"server: {name}",
        tries=tries,
        script=f"{_SERVER}{answer}\ntake_over()",
        stopped_by=stopped_by,
        watched=True,
        serves=True,
    )


_TIME = "one time for an answer"

LIES = (
    _lie(
        "garbage",
        "answers with bytes that are no HTTP",
        'def tools(): return [b"\\x00\\xff" * 1000]',
        stopped_by=("HTTP parser",),
    ),
    _lie(
        "endless head",
        "answers with a header that does not end",
        'def tools(): return endlessly(HEAD + b"X: ", b"x" * 65536)',
        stopped_by=("HTTP parser",),
    ),
    _lie(
        "endless answer",
        "answers with a body that does not end",
        'def tools(): return endlessly(HEAD + b"\\r\\n", b"x" * 65536)',
        stopped_by=("bounded answers",),
    ),
    _lie(
        "many values",
        "answers with more empty values than a list may have",
        """
def tools():
    yield HEAD + b'\\r\\n{"result": {"tools": [{}'
    for _ in range(6): yield b",{}" * 65536
    yield b"]}}"
""",
        stopped_by=("bounded values",),
    ),
    _lie(
        "large pages",
        "answers with a tool list of many large pages",
        'page = plain({"result": {"tools": ["x" * (10 << 20)], "nextCursor": "x"}})\ndef tools(): return [page]',
        stopped_by=("bounded answers",),
    ),
    _lie(
        "endless pages",
        "says at the end of its tool list that there is another page",
        'def tools(): return [plain({"result": {"tools": [], "nextCursor": "x"}})]',
        stopped_by=("bounded pages", "bounded values", "bounded answers", _TIME),
    ),
    _lie(
        "slow answer",
        "answers a byte at a time, each soon after the last one",
        'def health(): return endlessly(HEAD + b"Content-Length: 1000000\\r\\n\\r\\n", b" ", 0.05)',
        stopped_by=(_TIME,),
    ),
    _lie(
        "redirect",
        "sends the hub on to a port of the host's loopback",
        'def health(): return [b"HTTP/1.1 307 Elsewhere\\r\\nLocation: http://127.0.0.1:PORT/\\r\\n\\r\\n"]',
        stopped_by=("requests to one endpoint",),
    ),
)
