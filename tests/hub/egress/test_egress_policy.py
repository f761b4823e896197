"""What policies let out, and what addresses and their spellings never do."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_hub.egress.addresses import Surroundings, kind_of, local_networks4, local_networks6
from ash_hub.egress.names import Target, parse_authority, parse_host
from ash_hub.egress.policy import Grant, Policy, PolicyError, check_address
from ash_hub.egress.refusal import Refusal

PUBLIC = ("1.1.1.1", "93.184.216.34", "172.15.255.255", "172.32.0.1", "2606:4700::1111", "2a00:1450::1")
HIDDEN = {
    "0.0.0.0": "unspecified",
    "0.1.2.3": "unspecified",
    "127.0.0.1": "loopback",
    "127.255.0.9": "loopback",
    "10.1.2.3": "private",
    "172.16.0.1": "private",
    "192.168.1.1": "private",
    "100.64.0.1": "shared",
    "100.100.100.200": "metadata",
    "169.254.169.254": "link_local",
    "168.63.129.16": "metadata",
    "192.0.2.7": "documentation",
    "198.18.5.5": "benchmark",
    "192.88.99.1": "6to4",
    "224.0.0.251": "multicast",
    "255.255.255.255": "reserved",
    "::": "unspecified",
    "::1": "loopback",
    "::ffff:8.8.8.8": "mapped",
    "::8.8.8.8": "compatible",
    "64:ff9b::8.8.8.8": "nat64",
    "64:ff9b:1::7f00:1": "nat64",
    "2002:7f00:1::1": "6to4",
    "2001:0:1::1": "teredo",
    "2001:db8::1": "documentation",
    "fc00::1": "private",
    "fd00:ec2::254": "metadata",
    "fe80::1": "link_local",
    "fec0::1": "site_local",
    "ff02::1": "multicast",
    "4000::1": "reserved",
    "2a00::5efe:7f00:1": "isatap",
}


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_is_let_out(text: str) -> None:
    assert kind_of(ip_address(text)) is None


@pytest.mark.parametrize(("text", "kind"), HIDDEN.items())
def test_an_address_that_is_not_public_is_refused_by_its_kind(text: str, kind: str) -> None:
    assert kind_of(ip_address(text)) == kind
    host = f"[{text}]" if ":" in text else text
    grant = Policy.parse("internet").grant(parse_authority(f"{host}:443"))
    with pytest.raises(Refusal) as refused:
        check_address(grant, ip_address(text), Surroundings())
    assert refused.value.reason == kind


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_whatever_the_library_calls_not_global_is_not_public_here(address: IPv4Address | IPv6Address) -> None:
    if not address.is_global or address.is_multicast:
        assert kind_of(address) is not None


ODD_HOSTS = (
    *("", ".", "localhost.", "127.0.0.1.", "2130706433", "0x7f000001", "0x7f.1", "127.1", "127.0.1", "0177.0.0.1"),
    *("127.0.0.01", "256.0.0.1", "1.2.3.4.5", "1.2.3.0x4", "0x", "0", "example.0", "::1", "[::1", "[::1%lo]"),
    *(
        "[::1%25lo]",
        "[]",
        "[127.0.0.1]",
        "[::ffff:127.0.0.1%0]",
        "١٢٧.0.0.1",
        "\uff11\uff12\uff17.0.0.1",
        "127。0。0。1",
    ),
    *("ⓔxample.com", "exa mple.com", "example..com", "-a.com", "a-.com", "a" * 64 + ".com", "a." * 127 + "com"),
    *("ex%61mple.com", "example.com\\@evil", "a\0b.com", "a\r\nb.com", "example.com/", "exam\tple.com", "[v1.a]"),
)


@pytest.mark.parametrize("text", ODD_HOSTS)
def test_an_odd_spelling_of_a_host_is_refused(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_host(text)
    assert refused.value.reason in ("odd_name", "odd_address")


@pytest.mark.parametrize("text", ["a.com:0", "a.com:080", "a.com:65536", "a.com:+80", "a.com: 80", "a.com:", "a.com"])
def test_an_odd_port_is_refused(text: str) -> None:
    with pytest.raises(Refusal) as refused:
        parse_authority(text)
    assert refused.value.reason == "odd_port"


def test_a_user_name_before_the_host_is_refused() -> None:
    with pytest.raises(Refusal) as refused:
        parse_authority("example.com@127.0.0.1:80")
    assert refused.value.reason == "userinfo"


@given(st.text(max_size=60) | st.from_regex(r"[0-9a-fx.:\[\]%]{1,40}", fullmatch=True))
def test_a_host_that_is_accepted_has_one_spelling(text: str) -> None:
    try:
        host = parse_host(text)
    except Refusal:
        return
    again = f"[{host}]" if isinstance(host, IPv6Address) else str(host)
    assert parse_host(again) == host
    assert isinstance(host, IPv6Address) or again == text.lower()


def reason(policy: str | list[str], target: str) -> str | None:
    try:
        Policy.parse(policy).grant(parse_authority(target))
    except Refusal as refusal:
        return refusal.reason
    return None


@pytest.mark.parametrize(
    ("policy", "target", "expected"),
    [
        ("none", "example.com:443", "no_network"),
        ([], "example.com:443", "no_network"),
        ("internet", "example.com:443", None),
        ("internet", "example.com:80", None),
        ("internet", "example.com:22", "port"),
        ("internet", "localhost:80", "local_name"),
        (["example.com"], "EXAMPLE.com:443", None),
        (["EXAMPLE.com"], "example.com:443", None),
        (["example.com"], "www.example.com:443", "not_listed"),
        (["example.com"], "notexample.com:443", "not_listed"),
        (["example.com"], "example.com.evil.org:443", "not_listed"),
        (["example.com"], "1.1.1.1:443", "not_listed"),
        (["*.example.com"], "a.b.example.com:443", None),
        (["*.example.com"], "example.com:443", "not_listed"),
        (["*.example.com"], "aexample.com:443", "not_listed"),
        (["example.com:8443"], "example.com:8443", None),
        (["example.com:8443"], "example.com:443", "port"),
        (["example.com", "example.com:8443"], "example.com:8443", None),
        (["127.0.0.1:8080"], "127.0.0.1:8080", None),
        (["127.0.0.1:8080"], "127.0.0.1:8081", "port"),
        (["127.0.0.1:8080"], "127.0.0.2:8080", "not_listed"),
        (["[::1]:8080"], "[0:0::1]:8080", None),
        (["1.1.1.1"], "1.1.1.1:443", None),
        (["api.test=10.0.0.7:443"], "api.test:443", None),
        (["api.test=10.0.0.7:443"], "10.0.0.7:443", "not_listed"),
    ],
)
def test_a_policy_covers_what_it_says(policy: str | list[str], target: str, expected: str | None) -> None:
    assert reason(policy, target) == expected


@pytest.mark.parametrize(
    "entry",
    [
        *("internet ", "", "*", "*.com", "a.*.com", "**.example.com", "http://example.com", "example.com/x"),
        *("127.0.0.1", "[::1]", "10.0.0.1", "169.254.169.254:80", "0.0.0.0:80", "[fe80::1]:80", "224.0.0.1:80"),
        *("[::ffff:127.0.0.1]:80", "api.test=169.254.169.254:80", "api.test=10.0.0.1", "api.test=other.test:443"),
        *("10.0.0.1=10.0.0.2:80", "127.1:80", "example.com:99999", "*.10.0.0.1:80", "[64:ff9b::7f00:1]:80"),
    ],
)
def test_a_wrong_entry_is_no_policy(entry: str) -> None:
    with pytest.raises(PolicyError, match=r"."):
        Policy.parse([entry])


@pytest.mark.parametrize("text", ["Internet", "all", "example.com"])
def test_a_word_that_is_no_policy_says_what_is(text: str) -> None:
    with pytest.raises(PolicyError, match="none, internet, or a list"):
        Policy.parse(text)


def test_a_named_private_address_is_let_out_and_an_unnamed_one_of_the_same_list_is_not() -> None:
    policy = Policy.parse(["127.0.0.1:8080", "example.com"])
    named = policy.grant(Target(IPv4Address("127.0.0.1"), 8080))
    check_address(named, IPv4Address("127.0.0.1"), Surroundings())
    rebound = policy.grant(Target("example.com", 443))
    with pytest.raises(Refusal):
        check_address(rebound, IPv4Address("127.0.0.1"), Surroundings())


@pytest.mark.parametrize("text", ["169.254.169.254", "::ffff:127.0.0.1", "224.0.0.1", "0.0.0.0", "fe80::1"])
def test_some_addresses_are_refused_even_where_they_are_named(text: str) -> None:
    grant = Grant(Target("web.test", 80), "web.test=…", address=ip_address(text), named=True)
    with pytest.raises(Refusal):
        check_address(grant, ip_address(text), Surroundings())


def test_a_public_address_that_is_bound_here_is_refused_unless_it_is_named() -> None:
    here = Surroundings((ip_network("93.184.216.34/32"),))
    address = IPv4Address("93.184.216.34")
    with pytest.raises(Refusal) as refused:
        check_address(Policy.parse("internet").grant(Target(address, 443)), address, here)
    assert refused.value.reason == "this_host"
    check_address(Policy.parse(["93.184.216.34"]).grant(Target(address, 443)), address, here)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.2", "[::1]"])
def test_the_hive_itself_is_refused_even_when_it_is_named(host: str) -> None:
    known = Surroundings((ip_network("192.0.2.2/32"),), frozenset({8420}))
    target = parse_authority(f"{host}:8420")
    assert not isinstance(target.host, str)
    with pytest.raises(Refusal) as refused:
        check_address(Policy.parse([f"{host}:8420"]).grant(target), target.host, known)
    assert refused.value.reason == "hive"


def test_only_names_that_are_spelled_out_are_looked_up_as_the_host_does() -> None:
    policy = Policy.parse(["example.com", "*.example.org"])
    assert policy.grant(Target("example.com", 443)).as_host_does
    assert not policy.grant(Target("a.example.org", 443)).as_host_does
    assert not Policy.parse("internet").grant(Target("example.com", 443)).as_host_does


def test_a_refusal_does_not_tell_the_address_of_a_private_name() -> None:
    grant = Policy.parse("internet").grant(Target("db.corp.example", 443))
    with pytest.raises(Refusal) as refused:
        check_address(grant, IPv4Address("10.9.8.7"), Surroundings())
    assert "10.9.8.7" not in refused.value.message


FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     +-- 192.0.2.0/24 2 0 2
        +-- 192.0.2.0/30 2 0 2
           |-- 192.0.2.0
              /24 link UNICAST
           |-- 192.0.2.2
              /32 host LOCAL
        |-- 192.0.2.255
           /32 link BROADCAST
     |-- 198.51.100.0
        /24 host LOCAL
"""


def test_the_addresses_of_the_host_are_read_from_the_kernel() -> None:
    assert [str(network) for network in local_networks4(FIB_TRIE)] == ["192.0.2.2/32", "198.51.100.0/24"]
    text = "fd000000000000000000000000000002 04 40 00 82     eth0\n"
    assert [str(network) for network in local_networks6(text)] == ["fd00::2/128"]


def test_the_addresses_in_a_policy_that_are_not_public_are_told() -> None:
    policy = Policy.parse(["10.0.0.7:8080", "1.1.1.1", "example.com", "api.test=10.0.0.8:80", "dns.test=8.8.8.8"])
    assert policy.private == ("10.0.0.7", "10.0.0.8")
    assert Policy.parse("internet").private == ()


@pytest.mark.parametrize(
    ("policy", "target", "more"),
    [
        ("internet", "example.com:443", {}),
        ("internet", "1.1.1.1:80", {"address": ip_address("1.1.1.1")}),
        (["1.1.1.1:8080"], "1.1.1.1:8080", {"address": ip_address("1.1.1.1"), "named": True}),
        (["example.com"], "example.com:80", {"as_host_does": True, "server_name": "example.com"}),
        (["*.example.com"], "a.example.com:80", {"server_name": "a.example.com"}),
        (
            ["api.test=10.0.0.7:443"],
            "api.test:443",
            {"address": ip_address("10.0.0.7"), "named": True, "as_host_does": True, "server_name": "api.test"},
        ),
        (["*.a.test", "x.a.test"], "x.a.test:443", {"as_host_does": True, "server_name": "x.a.test"}),
        (["x.a.test", "*.a.test"], "x.a.test:443", {"as_host_does": True, "server_name": "x.a.test"}),
        (["*.x.a.test", "*.a.test"], "y.x.a.test:443", {"server_name": "y.x.a.test"}),
    ],
)
def test_a_grant_says_all_that_dialling_needs(policy: str | list[str], target: str, more: dict[str, Any]) -> None:
    parsed = Policy.parse(policy)
    assert parsed.grant(parse_authority(target)) == Grant(parse_authority(target), parsed.text, **more)


@pytest.mark.parametrize(
    ("entry", "ports"),
    [
        ("1.1.1.1", {80, 443}),
        ("1.1.1.1:8080", {8080}),
        ("[2606:4700::1111]", {80, 443}),
        ("api.test=1.1.1.1", {80, 443}),
        ("api.test=10.0.0.7:80", {80}),
        ("*.example.com:8443", {8443}),
        ("*.example.com", {80, 443}),
    ],
)
def test_an_entry_is_for_the_port_that_it_names_or_for_the_usual_ones(entry: str, ports: set[int]) -> None:
    assert [read.ports for read in Policy.parse([entry]).entries or ()] == [ports]


def test_a_refused_port_is_told_which_ones_are_open() -> None:
    with pytest.raises(Refusal, match="at port 443, 8443, not 80"):
        Policy.parse(["example.com:8443", "example.com:443"]).grant(Target("example.com", 80))
    with pytest.raises(PolicyError, match="name the one port that is meant"):
        Policy.parse(["10.0.0.1"])
    with pytest.raises(PolicyError, match="can never be reached"):
        Policy.parse(["0.0.0.0:80"])
    with pytest.raises(PolicyError, match="nothing below an address"):
        Policy.parse(["*.10.0.0.1:80"])
    with pytest.raises(PolicyError, match="too wide"):
        Policy.parse(["*.com"])
    with pytest.raises(PolicyError, match="stands before the ="):
        Policy.parse(["api.test=other.test:443"])


def test_a_policy_has_256_entries_at_most_and_shows_200_letters_of_them() -> None:
    assert len(Policy.parse(["a.test"] * 256).entries or ()) == 256
    with pytest.raises(PolicyError, match="256 entries at most, not 257"):
        Policy.parse(["a.test"] * 257)
    longest = ".".join(("a" * 50, "b" * 50, "c" * 50, "d" * 47))
    assert Policy.parse([longest]).text == longest
    assert Policy.parse([f"{longest}d"]).text == f"{longest}…"


WITHIN: list[tuple[str | list[str], str | list[str]]] = [
    ("none", "none"),
    ("none", "internet"),
    ("none", ["example.com"]),
    ([], "none"),
    ("internet", "internet"),
    (["example.com"], "internet"),
    (["example.com:443", "example.com:80"], "internet"),
    (["*.example.com"], "internet"),
    (["example.com"], ["example.org", "example.com"]),
    (["EXAMPLE.com"], ["example.com"]),
    (["a.example.com"], ["*.example.com"]),
    (["*.a.example.com"], ["*.example.com"]),
    (["*.example.com"], ["*.example.com"]),
    (["example.com:443"], ["example.com"]),
    (["example.com"], ["example.com:80", "example.com:443"]),
    (["*.example.com:443"], ["*.example.com"]),
    (["*.example.com"], ["*.example.com:80", "*.example.com:443"]),
    (["git.test:8443"], ["git.test:8443", "example.com"]),
    (["10.0.0.7:443"], ["10.0.0.7:443"]),
    (["api.test=10.0.0.7:443"], ["api.test=10.0.0.7:443"]),
    (["api.test=10.0.0.7:443"], ["API.test=10.0.0.7:443", "example.com"]),
    (["api.test:443"], ["api.test=10.0.0.7:443"]),
]
BEYOND: list[tuple[str | list[str], str | list[str]]] = [
    ("internet", "none"),
    ("internet", ["example.com"]),
    (["example.com"], "none"),
    (["example.com"], ["example.org"]),
    (["example.com", "example.org"], ["example.org"]),
    (["example.com"], ["*.example.com"]),
    (["*.example.com"], ["example.com"]),
    (["*.example.com"], ["*.a.example.com"]),
    (["*.notexample.com"], ["*.example.com"]),
    (["*.a.example.com"], ["a.example.com"]),
    (["*.example.com"], ["*.example.com:443"]),
    (["example.com"], ["example.com:443"]),
    (["example.com:8443"], ["example.com"]),
    (["example.com:8443"], "internet"),
    (["*.example.com:8443"], "internet"),
    (["localhost"], "internet"),
    (["1.1.1.1"], "internet"),
    (["127.0.0.1:80"], "internet"),
    (["10.0.0.7:443"], ["10.0.0.8:443"]),
    (["api.example.com=10.0.0.7:443"], "internet"),
    (["api.example.com=10.0.0.7:443"], ["*.example.com"]),
    (["api.example.com=10.0.0.7:443"], ["api.example.com"]),
    (["api.test=10.0.0.7:443"], ["api.test=10.0.0.8:443"]),
    (["api.test=10.0.0.7:443"], ["10.0.0.7:443"]),
]


@pytest.mark.parametrize(("narrow", "wide"), WITHIN)
def test_a_policy_that_grants_no_more_is_within(narrow: str | list[str], wide: str | list[str]) -> None:
    assert Policy.parse(narrow).is_within(Policy.parse(wide))


@pytest.mark.parametrize(("wide", "narrow"), BEYOND)
def test_a_policy_that_grants_anything_more_is_not_within(wide: str | list[str], narrow: str | list[str]) -> None:
    assert not Policy.parse(wide).is_within(Policy.parse(narrow))


ENTRIES = (
    "a.test b.a.test c.b.a.test *.a.test *.b.a.test a.test:443 *.a.test:443 a.test:8443 local 10.0.0.7:443 1.1.1.1 "
    "a.test=10.0.0.7:443 a.test=10.0.0.8:443 b.a.test=10.0.0.7:80"
)
POLICIES = st.sampled_from(["none", "internet"]) | st.lists(st.sampled_from(ENTRIES.split()), max_size=4, unique=True)
TARGETS = [
    Target(parse_host(host), port)
    for host in ("a.test", "b.a.test", "c.b.a.test", "d.c.b.a.test", "local", "10.0.0.7", "1.1.1.1", "other.test")
    for port in (80, 443, 8443)
]


def granted(policy: Policy) -> dict[Target, Grant]:
    found: dict[Target, Grant] = {}
    for target in TARGETS:
        with contextlib.suppress(Refusal):
            found[target] = policy.grant(target)
    return found


@given(POLICIES, POLICIES)
def test_what_a_policy_within_another_grants_the_other_grants_too(one: str | list[str], two: str | list[str]) -> None:
    narrow, wide = Policy.parse(one), Policy.parse(two)
    if not narrow.is_within(wide):
        return
    grants = granted(wide)
    for target, grant in granted(narrow).items():
        assert target in grants
        if grant.named:
            assert grants[target].named and grants[target].address == grant.address


@given(POLICIES, POLICIES, POLICIES)
def test_being_within_is_an_order(one: str | list[str], two: str | list[str], three: str | list[str]) -> None:
    narrow, middle, wide = (Policy.parse(each) for each in (one, two, three))
    assert narrow.is_within(narrow) and Policy.parse("none").is_within(narrow)
    if narrow.is_within(middle) and middle.is_within(wide):
        assert narrow.is_within(wide)
