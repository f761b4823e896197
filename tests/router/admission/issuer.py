"""A small OpenID provider for tests: a real HTTP server with a discovery document, keys, and tokens signed by them.

Everybody who asks it to log in is logged in, as `ann`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "http://hive.test/mcp"


@cache
def _rsa_key(kid: str) -> rsa.RSAPrivateKey:
    """Make the key of a name once for all issuers: it takes a twentieth of a second."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


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
        self.keys[kid] = ec.generate_private_key(ec.SECP256R1()) if elliptic else _rsa_key(kid)

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
            return {
                "issuer": self.claims_to_be or self.url,
                "jwks_uri": f"{self.url}/keys",
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "registration_endpoint": f"{self.url}/register",
                "response_types_supported": ["code"],
                "code_challenge_methods_supported": ["S256"],
            }
        if path == "/keys":
            return {"keys": [_public(kid, key) for kid, key in self.keys.items()]}
        return None

    def take(self, path: str, body: str) -> Any:
        """Answer what is posted: a client that registers, or a code that becomes a token."""
        self.asked[path] += 1
        if path == "/register":
            return {**json.loads(body), "client_id": "host", "token_endpoint_auth_method": "none"}
        (resource,) = parse_qs(body)["resource"]
        return {"access_token": self.token("ann", aud=resource), "token_type": "Bearer", "expires_in": 300}


def _public(kid: str, key: Any) -> dict[str, Any]:
    maker: Any = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    return {**maker.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}


@contextmanager
def running_issuer() -> Generator[Issuer]:
    issuer = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path == "/authorize":
                asked = parse_qs(query)
                self.send_response(302)
                self.send_header("location", f"{asked['redirect_uri'][0]}?code=c0de&state={asked['state'][0]}")
                self.end_headers()
            else:
                self.say(issuer.answer(path))

        def do_POST(self) -> None:
            self.say(issuer.take(self.path, self.rfile.read(int(self.headers["content-length"])).decode()))

        def say(self, said: Any) -> None:
            body = json.dumps(said).encode()
            self.send_response(200 if said is not None else 503 if issuer.away else 404)
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
