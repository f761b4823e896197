"""Hosts of previews: what each leads to, who comes in, and that they reach nothing of the hive."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Final

import pytest

from ash_mcp.errors import ConnectFailed
from ash_mcp.types import NO_LIMITS, SandboxId
from ash_router.admission.base import Admitted, Head, Preview, Refusal, SentOn
from ash_router.admission.gate import Gate
from ash_router.admission.preview_hosts import PreviewNames, without_cookie
from ash_router.admission.share_tokens import SharedSandbox, ShareTokens
from ash_router.admission.shares import Share, new_share
from tests.router.admission.gate_parts import admitted, gate, head, refused

BOX: Final = SandboxId("sbx-shared")
WILDCARD: Final = "https://*.previews.test"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hive:
    """A gate before one sandbox with ports, and the shares of it."""

    def __init__(self, keys: Path, wildcard: str | None = None) -> None:
        self.now = 1000.0
        self.known: dict[str, SharedSandbox] = {}
        self.elsewhere: dict[str, SharedSandbox] = {}
        self.away = False
        self.keys = keys
        self.names = PreviewNames(wildcard)
        self.gate = self.build(alone=True)

    def build(self, *, alone: bool) -> Gate:
        made = gate(self.keys, previews=self.names)
        made.take_shares(ShareTokens(self.known.get, None if alone else self.look_up, lambda: self.now, NO_LIMITS))
        return made

    async def look_up(self) -> None:
        if self.away:
            raise ConnectFailed("away")
        self.known |= self.elsewhere

    def share(self, *ports: int, ttl: float | None = None, elsewhere: bool = False) -> tuple[Share, str]:
        share, token = new_share([], self.now, ttl, ports)
        shared = SharedSandbox(share, BOX, frozenset({BOX, "sb1"}))
        (self.elsewhere if elsewhere else self.known)[share.id] = shared
        return share, token

    def asked(
        self,
        host: str,
        target: str = "/",
        *,
        method: str = "GET",
        cookie: str | None = None,
        more: Sequence[tuple[bytes, bytes]] = (),
    ) -> Admitted | Refusal | Awaitable[Admitted | Refusal]:
        headers = [(b"host", host.encode()), *more]
        if cookie is not None:
            headers.append((b"cookie", cookie.encode()))
        return self.gate.admit(Head(method, target.encode(), headers, ("127.0.0.1", 1), ("127.0.0.1", 8420)))


@pytest.fixture
def hive(tmp_path: Path) -> Hive:
    return Hive(tmp_path / "keys.json")


def at(port: int, share: Share, domain: str = "localhost:8420") -> str:
    return f"{port}-{share.label}.{domain}"


def test_the_first_visit_gets_a_cookie_of_this_host_alone_and_goes_on_without_the_secret(hive: Hive):
    share, token = hive.share(8000)
    host = at(8000, share)
    for asked, left in (
        (f"/?ash_share={token}", "/"),
        (f"/a%20b//?x=1&ash_share={token}&y=%26", "/a%20b//?x=1&y=%26"),
        (f"//elsewhere.test/?ash_share={token}", "//elsewhere.test/"),
    ):
        sent = hive.asked(host, asked)
        assert isinstance(sent, SentOn) and sent.status == 303
        headers = dict(sent.headers)
        assert headers["Location"] == f"http://{host}{left}"
        assert headers["Set-Cookie"] == f"ash-preview={token}; Path=/; HttpOnly; SameSite=Lax"
        assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
        assert token not in str(sent.error)


def test_the_cookie_leads_to_the_port_and_the_path_is_the_servers(hive: Hive):
    share, token = hive.share(8000, 9000)
    for port in (8000, 9000):
        for target in ("/", "/mcp", "/s/sb1/mcp", "/s/sb1/files/x", "/metrics", "/healthz", "/%2e%2e/_ash/claim?a=b"):
            verdict = admitted(hive.asked(at(port, share), target, cookie=f"a=b; ash-preview={token}; c"))
            assert verdict.preview == Preview(port, at(port, share), "http")
            assert (verdict.principal.subject, verdict.principal.sandbox) == (f"share:{share.id}", BOX)
            assert (verdict.path, verdict.by, verdict.url) == ("/", f"share:{share.id}", f"http://{at(port, share)}")


CLOSED: Final = {
    "no cookie": (8000, "first", None, 0.0),
    "another share's": (8000, "first", "second", 0.0),
    "a port that it does not open": (9000, "first", "first", 0.0),
    "the port of another share": (9000, "second", "first", 0.0),
    "a label that nobody has": (8000, "none", "first", 0.0),
    "expired": (8000, "first", "first", 60.0),
    "forged": (8000, "first", "forged", 0.0),
    "an API key": (8000, "first", "key", 0.0),
    "empty": (8000, "first", "empty", 0.0),
    "two of them": (8000, "first", "two", 0.0),
    "one and another secret": (8000, "first", "forged too", 0.0),
}


@pytest.mark.parametrize("case", CLOSED)
def test_everything_else_is_one_and_the_same_refusal(hive: Hive, case: str):
    port, label, secret, later = CLOSED[case]
    (first, token), (second, other) = hive.share(8000, ttl=60), hive.share(9000)
    labels = {"first": first.label, "second": second.label, "none": "a" * 20}
    tokens = {
        "first": token,
        "second": other,
        "forged": token[:-1] + ("a" if token[-1] != "a" else "b"),
        "key": "ashk_" + token[5:],
        "empty": "",
        "two": f"{other}; ash-preview={other}",
        "forged too": f"{token}; ash-preview={token[:-1]}",
    }
    host = f"{port}-{labels[label]}.localhost:8420"
    assert isinstance(hive.asked(at(8000, first), cookie=f"ash-preview={token}"), Admitted)
    hive.now += later
    cookie = None if secret is None else f"ash-preview={tokens[secret]}"
    said = refused(hive.asked(host, cookie=cookie))
    query = "" if secret is None else f"?ash_share={tokens[secret].partition(';')[0]}"
    again = refused(hive.asked(host, f"/{query}"))
    assert again is said or case == "one and another secret"
    assert (said.error.kind, said.headers) == ("unauthenticated", ())


def test_a_cookie_that_another_preview_has_set_for_it_does_not_close_it(hive: Hive):
    (share, token), (_, other) = hive.share(8000), hive.share(8000)
    assert isinstance(hive.asked(at(8000, share), cookie=f"ash-preview={other}; ash-preview={token}"), Admitted)


def test_a_revoked_share_is_over(hive: Hive):
    share, token = hive.share(8000)
    assert isinstance(hive.asked(at(8000, share), cookie=f"ash-preview={token}"), Admitted)
    hive.known.clear()
    assert refused(hive.asked(at(8000, share), cookie=f"ash-preview={token}")).error.kind == "unauthenticated"


def test_a_credential_of_the_hive_opens_no_preview(hive: Hive):
    share, token = hive.share(8000)
    for more in ([(b"authorization", f"Bearer {token}".encode())], [(b"x-session-id", BOX.encode())]):
        assert refused(hive.asked(at(8000, share), more=more)).error.kind == "unauthenticated"


FOREIGN: Final = {
    "a page of the hive": [(b"origin", b"http://127.0.0.1:8420")],
    "another origin": [(b"origin", b"https://page.test")],
    "nobody's origin": [(b"origin", b"null")],
    "the same name by https": [(b"origin", b"https://HOST")],
    "another port of this machine": [(b"origin", b"http://NAME:9")],
    "an image of another site": [
        (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"no-cors"), (b"sec-fetch-dest", b"image")
    ],
    "an image of a sibling": [
        (b"sec-fetch-site", b"same-site"), (b"sec-fetch-mode", b"no-cors"), (b"sec-fetch-dest", b"image")
    ],
    "a frame": [
        (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"), (b"sec-fetch-dest", b"iframe")
    ],
    "two sites": [(b"sec-fetch-site", b"same-origin"), (b"sec-fetch-site", b"cross-site")],
    "an unknown site": [(b"sec-fetch-site", b"")],
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_pages_of_other_origins_reach_no_preview(hive: Hive, case: str):
    share, token = hive.share(8000)
    host = at(8000, share)
    said = [
        (name, value.replace(b"HOST", host.encode()).replace(b"NAME", host.partition(":")[0].encode()))
        for name, value in FOREIGN[case]
    ]
    for target, cookie in (("/", f"ash-preview={token}"), (f"/?ash_share={token}", None)):
        refusal = refused(hive.asked(host, target, cookie=cookie, more=said))
        assert refusal.error.kind == "permission_denied" and not refusal.headers


def test_its_own_page_and_who_follows_a_link_come_in(hive: Hive):
    share, token = hive.share(8000)
    host, cookie = at(8000, share), f"ash-preview={token}"
    own = [(b"origin", f"http://{host}".encode()), (b"sec-fetch-site", b"same-origin")]
    assert isinstance(hive.asked(host, method="POST", cookie=cookie, more=own), Admitted)
    link = [(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"), (b"sec-fetch-dest", b"document")]
    assert isinstance(hive.asked(host, cookie=cookie, more=link), Admitted)
    assert isinstance(hive.asked(host, f"/?ash_share={token}", more=link), SentOn)
    assert isinstance(hive.asked(host, method="POST", cookie=cookie, more=link), Refusal)
    assert refused(hive.asked(host, f"/?ash_share={token}", method="POST")).error.kind == "bad_request"


@pytest.mark.parametrize(
    "shape",
    [
        "{label}.localhost:8420", "0-{label}.localhost:8420", "08000-{label}.localhost", "8000-{label}.localhost.",
        "8000-{label}.localhost:", "8000-{label}x.localhost", "x.8000-{label}.localhost", "8000-{label}.127.0.0.1",
        "8000-{label}.previews.test", "8000-{label}.localhost.test", "8000-sb1.localhost:8420", "8000-{label}",
        "sb1.localhost", "localhost.test", "8000-{label}.localhost:8420@x", "8000_{label}.localhost",
    ],
)  # fmt: skip
def test_no_other_host_is_one_of_a_preview_or_of_the_hive(hive: Hive, shape: str):
    share, token = hive.share(8000)
    for path in ("/", "/mcp"):
        verdict = refused(hive.asked(shape.format(label=share.label), path, cookie=f"ash-preview={token}"))
        assert verdict.status == 421


def test_a_name_may_be_in_capitals_and_two_hosts_are_none(hive: Hive):
    share, token = hive.share(8000)
    assert isinstance(hive.asked(at(8000, share).upper(), cookie=f"ash-preview={token}"), Admitted)
    twice = [(b"host", at(8000, share).encode())]
    assert refused(hive.asked(at(8000, share), cookie=f"ash-preview={token}", more=twice)).status == 400


def test_the_hive_itself_is_not_served_to_a_preview_and_knows_none_of_its_origins(hive: Hive):
    share, token = hive.share(8000)
    page = (b"origin", f"http://{at(8000, share)}".encode())
    for more in ([page], [page, (b"cookie", f"ash-preview={token}".encode())]):
        for path in ("/mcp", "/s/sb1/mcp", "/s/sb1/ports/8000/", "/", "/readyz"):
            assert refused(hive.gate.admit(head(path, more=more))).error.kind == "permission_denied"


def test_a_wildcard_host_is_https_and_its_cookie_nobody_elses_to_set(tmp_path: Path):
    hive = Hive(tmp_path / "keys.json", WILDCARD)
    share, token = hive.share(8000)
    host = at(8000, share, "previews.test")
    sent = hive.asked(host, f"/x?ash_share={token}")
    assert isinstance(sent, SentOn)
    headers = dict(sent.headers)
    assert headers["Location"] == f"https://{host}/x"
    assert headers["Set-Cookie"] == f"__Host-ash-preview={token}; Path=/; HttpOnly; SameSite=Lax; Secure"
    assert isinstance(hive.asked(host, cookie=f"ash-preview={token}"), Refusal)
    own = [(b"origin", f"https://{host}".encode())]
    found = admitted(hive.asked(host, cookie=f"__Host-ash-preview={token}", more=own))
    assert found.preview == Preview(8000, host, "https")
    assert isinstance(
        hive.asked(host, cookie=f"__Host-ash-preview={token}", more=[(b"origin", f"http://{host}".encode())]), Refusal
    )


def test_urls_are_below_the_wildcard_or_localhost():
    label = "a" * 20
    assert PreviewNames().url("http://127.0.0.1:8420", 8000, label) == f"http://8000-{label}.localhost:8420/"
    assert PreviewNames().url("http://localhost:1", 1, label) == f"http://1-{label}.localhost:1/"
    assert PreviewNames(tls=True).url("https://[::1]:8420", 1, label) == f"https://1-{label}.localhost:8420/"
    assert PreviewNames().url("http://10.0.0.5:8420", 8000, label) is None
    assert PreviewNames().url("https://hive.test", 8000, label) is None
    assert PreviewNames(WILDCARD).url("http://10.0.0.5:8420", 8000, label) == f"https://8000-{label}.previews.test/"


@pytest.mark.anyio
async def test_a_share_that_another_process_made_is_found_and_none_is_said_to_be_bad_while_nobody_knows(hive: Hive):
    share, token = hive.share(8000, elsewhere=True)
    hive.gate = hive.build(alone=False)
    hive.away = True
    said = hive.asked(at(8000, share), cookie=f"ash-preview={token}")
    assert isinstance(said, Awaitable) and refused(await said).status == 503
    hive.away = False
    said = hive.asked(at(8000, share), cookie=f"ash-preview={token}")
    assert isinstance(said, Awaitable) and isinstance(await said, Admitted)


def test_labels_are_too_long_for_sessions_and_never_the_same(hive: Hive):
    labels = {hive.share(8000)[0].label for _ in range(200)}
    assert len(labels) == 200 and {len(label) for label in labels} == {20}
    assert new_share(["run"], 0.0, None)[0].label == ""


def test_the_cookie_that_opens_it_is_no_cookie_of_the_server():
    assert without_cookie([b"a=b; ash-preview=x", b"__Host-ash-preview=y;c=d;", b""]) == b"a=b; c=d"
    assert without_cookie([b"ash-preview=x"]) == b""
    assert without_cookie([b"ash-preview =x; ash-preview2=y"]) == b"ash-preview2=y"
