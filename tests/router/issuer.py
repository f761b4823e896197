"""A small OpenID provider for tests: a real HTTP server with a discovery document, keys, and tokens signed by them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "http://hive.test/mcp"


class Issuer:
    """What the provider says; a test may change it."""

    def __init__(self) -> None:
        self.url = ""
        self.keys: dict[str, Any] = {}
        self.asked: Counter[str] = Counter()
        self.away = False
        self.claims_to_be: str | None = None
        self.add_key("first")

    def add_key(self, kid: str, *, elliptic: bool = False) -> None:
        self.keys[kid] = (
            ec.generate_private_key(ec.SECP256R1())
            if elliptic
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )

    def token(self, subject: str = "ann", *, kid: str | None = "first", key: Any = None, **claims: Any) -> str:
        """Return a token that is good unless `claims` spoil it; None takes a claim out."""
        now = time.time()
        body = {"iss": self.url, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 300, **claims}
        body = {name: value for name, value in body.items() if value is not None}
        signer = key if key is not None else self.keys[kid or "first"]
        algorithm = "ES256" if isinstance(signer, ec.EllipticCurvePrivateKey) else "RS256"
        return jwt.encode(body, signer, algorithm=algorithm, headers={"kid": kid} if kid is not None else {})

    def answer(self, path: str) -> Any:
        self.asked[path] += 1
        if self.away:
            return None
        if path == "/.well-known/openid-configuration":
            return {"issuer": self.claims_to_be or self.url, "jwks_uri": f"{self.url}/keys"}
        if path == "/keys":
            return {"keys": [_public(kid, key) for kid, key in self.keys.items()]}
        return None


def _public(kid: str, key: Any) -> dict[str, Any]:
    maker: Any = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    return {**maker.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}


@contextmanager
def running_issuer() -> Generator[Issuer]:
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = issuer.answer(self.path)
            body = json.dumps(said).encode()
            self.send_response(503 if said is None else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        issuer.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield issuer
        finally:
            server.shutdown()
            thread.join()
