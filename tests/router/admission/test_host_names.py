"""The names of a hive, apart from all else that admission looks at."""

from __future__ import annotations

import pytest

from ash_router.admission.base import Head
from ash_router.admission.host_names import NameRules


def head(*hosts: str, origins: tuple[str, ...] = ()) -> Head:
    named = [(b"host", host.encode()) for host in hosts] + [(b"origin", origin.encode()) for origin in origins]
    return Head("POST", b"/mcp", named, ("127.0.0.1", 1), ("127.0.0.1", 8420))


def status(rules: NameRules, *hosts: str, origins: tuple[str, ...] = ()) -> int | None:
    """Return the status of a refusal, 0 for one without its own, None where there is none."""
    refusal = rules.check(head(*hosts, origins=origins))
    return None if refusal is None else refusal.status or 0


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        ("127.0.0.1", None),
        ("LocalHost", None),
        ("localhost:1", None),
        ("[::1]", None),
        ("[::1]:8420", None),
        ("Hive.Test:443", None),
        ("hive.test:", 421),
        ("hive.test:x", 421),
        ("hive.test:-1", 421),
        ("127.0.0.2", None),
        ("10.0.0.5", 421),
        ("10.0.0.5:80", 421),
        ("[fd00::1]", 421),
        ("[::1%lo]:80", 421),
        (":80", 421),
    ],
)
def test_a_hive_answers_to_its_own_names_and_to_loopback_addresses(host: str, refused: int | None) -> None:
    assert status(NameRules(port=8420, hosts=["HIVE.test"]), host) == refused


@pytest.mark.parametrize(
    ("host", "refused"), [("10.0.0.5:80", None), ("[fd00::1]", None), ("[fe80::1%lo]", 421), ("evil.test", 421)]
)
def test_any_address_is_an_honest_name_where_each_request_needs_a_credential(host: str, refused: int | None) -> None:
    assert status(NameRules(port=8420, any_address=True), host) == refused


def test_exactly_one_host_is_wanted() -> None:
    rules = NameRules(port=8420)
    assert (status(rules), status(rules, "localhost", "localhost")) == (400, 400)


@pytest.mark.parametrize(("tls", "scheme", "other"), [(False, "http", "https"), (True, "https", "http")])
def test_a_hives_own_pages_have_its_scheme_and_port(tls: bool, scheme: str, other: str) -> None:
    rules = NameRules(port=8420, origins=["https://page.test"], tls=tls)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert status(rules, "localhost", origins=(f"{scheme}://{host}:8420",)) is None
        assert status(rules, "localhost", origins=(f"{other}://{host}:8420",)) == 0
        assert status(rules, "localhost", origins=(f"{scheme}://{host}:8421",)) == 0
    assert status(rules, "localhost", origins=("https://page.test",)) is None
    assert status(rules, "localhost", origins=("https://page.test", "https://evil.test")) == 0
    assert status(rules, "evil.test", origins=("https://page.test",)) == 421


def test_the_url_of_a_hive_is_the_name_that_its_caller_used() -> None:
    assert NameRules(port=1).base_url(head("Hive.Test:99")) == "http://hive.test:99"
    assert NameRules(port=1, tls=True).base_url(head("localhost")) == "https://localhost"
