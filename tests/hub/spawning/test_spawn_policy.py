"""The spawn policy: what a spawn may ask for, and how a recipe's network is narrowed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import ValidationError

from ash_hub.egress.names import Target
from ash_hub.egress.policy import Policy
from ash_hub.egress.refusal import Refusal
from ash_hub.settings import HubSettings, SpawnLimits
from ash_hub.spawning.recipes import Catalog, Network, Recipe
from ash_hub.spawning.spawn_policy import SpawnPolicy, check_limits, narrowed
from ash_hub.spawning.spawn_request import ImageAsk, SpawnAsk
from ash_mcp.errors import ConfigError, PermissionDenied
from ash_mcp.types import Principal, PrincipalLimits, SandboxId
from ash_router.admission.base import LOCAL
from ash_router.bounds.effective_limits import EffectiveLimit
from tests.hub.world import MakeWorld


def ask(**asked: Any) -> SpawnAsk:
    return SpawnAsk.model_validate({"recipe": "test", **asked})


def recipe(**more: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "description": "For tests.", "server": {"python": "a:b"}, **more})


@pytest.mark.parametrize(
    ("limits", "allowed", "refused", "says"),
    [
        ({"images": ["reg.test/team/*"]}, {"image": "reg.test/team/a:1"}, {"image": "reg.test/other/a:1"}, "IMAGES"),
        (
            {"runtime_classes": ["gvisor"]},
            {"runtime_class": "gvisor"},
            {"runtime_class": "kata-fc"},
            "RUNTIME_CLASSES",
        ),
        ({"runtime_classes": []}, {}, {"runtime_class": "gvisor"}, "none"),
        (
            {"node_selectors": {"pool": ["agents-*"]}},
            {"node_selector": {"pool": "agents-1"}},
            {"node_selector": {"pool": "control"}},
            "NODE_SELECTORS",
        ),
        ({"node_selectors": {"pool": ["a"]}}, {}, {"node_selector": {"zone": "a"}}, "node_selector zone"),
        ({"cpu": "2"}, {"resources": {"limits": {"cpu": "2000m"}}}, {"resources": {"limits": {"cpu": "2.5"}}}, "CPU"),
        ({"cpu": "2"}, {}, {"resources": {"requests": {"cpu": "3"}}}, "at most 2"),
        (
            {"memory": "1Gi"},
            {"resources": {"limits": {"memory": "1Gi"}}},
            {"resources": {"limits": {"memory": "2G"}}},
            "MEMORY",
        ),
        ({"network": "none"}, {"network": "none"}, {"network": "internet"}, "NETWORK"),
        ({"network": ["*.ok.test"]}, {"network": ["a.ok.test"]}, {"network": ["a.ok.test", "bad.test"]}, "bad.test"),
        ({"network": ["ok.test"]}, {"network": []}, {"network": "internet"}, "allowed: ok.test"),
    ],
)
def test_a_spawn_may_ask_for_what_is_allowed_and_no_more(
    limits: dict[str, Any], allowed: dict[str, Any], refused: dict[str, Any], says: str
) -> None:
    bounds = SpawnLimits.model_validate(limits)
    check_limits(bounds, ask(**allowed))
    check_limits(SpawnLimits(), ask(**refused))
    with pytest.raises(PermissionDenied, match=says.replace("*", r"\*")):
        check_limits(bounds, ask(**refused))


@pytest.mark.parametrize(
    ("limits", "inline"),
    [
        ({"images": []}, {"image": "any"}),
        ({"runtime_classes": ["gvisor"]}, {"runtime_class": "runc"}),
        ({"node_selectors": {"pool": ["a"]}}, {"node_selector": {"pool": "b"}}),
        ({"memory": "1Gi"}, {"resources": {"limits": {"memory": "2Gi"}}}),
        ({"network": "none"}, {"network": "internet"}),
    ],
)
def test_a_recipe_that_a_spawn_brings_is_its_own_word(limits: dict[str, Any], inline: dict[str, Any]) -> None:
    with pytest.raises(PermissionDenied):
        check_limits(SpawnLimits.model_validate(limits), ask(recipe=recipe(**inline).model_dump()))


def test_a_recipe_of_the_hive_may_have_more_but_for_the_network(tmp_path: Path) -> None:
    own = recipe(network="internet", image="big", resources={"limits": {"memory": "64Gi"}})
    limits = SpawnLimits(images=(), memory="1Gi", network="none")
    policy = SpawnPolicy(HubSettings(state_dir=tmp_path, run_dir=tmp_path, spawn=limits), Catalog([own]))
    found = policy.judge(ask(), LOCAL)
    assert (found.recipe.network, found.recipe.image) == ("none", "big")
    assert found.network_note == "network: none, because this hive allows none (its recipe asks for internet)"
    assert policy.judge(ask(network="none"), LOCAL).network_note == ""


def policy_of(tmp_path: Path, *recipes: Recipe, **settings: Any) -> SpawnPolicy:
    return SpawnPolicy(HubSettings(state_dir=tmp_path, run_dir=tmp_path, **settings), Catalog(recipes or [recipe()]))


def test_a_key_narrows_what_its_bearer_may_ask_for_and_says_so(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, recipe(network="internet"), spawn=SpawnLimits(network=("a.test", "b.test")))
    bearer = Principal("ann", spawn_policy='{"images":["team/*"],"network":["b.test","c.test"]}')
    found = policy.judge(ask(image="team/x"), bearer)
    assert found.recipe.network == ("b.test",)
    assert found.network_note == (
        "network: b.test, because this hive allows a.test, b.test and your key allows b.test, c.test "
        "(its recipe asks for internet)"
    )
    with pytest.raises(PermissionDenied, match=r"with your key; allowed: team/\*. .*ash key new --image"):
        policy.judge(ask(image="other"), bearer)
    policy.judge(ask(image="other"), LOCAL)
    with pytest.raises(PermissionDenied, match="ASH_HUB_SPAWN__NETWORK"):  # a key widens nothing
        policy.judge(ask(network=["c.test"]), bearer)


def test_what_a_key_says_that_cannot_be_read_lets_nothing_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionDenied, match="ash key new"):
        policy_of(tmp_path, recipe()).judge(ask(), Principal("ann", spawn_policy='{"of_a_later_hive": 1}'))


def test_how_many_may_wait_is_the_keys_or_the_hives(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, recipe(), limits={"waiting_per_owner": 5})
    assert policy.judge(ask(), LOCAL).waiting == EffectiveLimit(5)
    assert policy.judge(ask(), Principal("a", limits=PrincipalLimits(waiting=2))).waiting == EffectiveLimit(
        2, by_key=True
    )


@pytest.mark.parametrize(
    ("network", "most", "is_left"),
    [
        ("internet", "internet", "internet"),
        ("internet", ("a.test",), ("a.test",)),
        (
            ("a.test", "B.test:8443", "c.b.test"),
            ("A.test", "b.test:8443", "*.b.test"),
            ("a.test", "B.test:8443", "c.b.test"),
        ),
        (("a.test:443",), ("a.test",), ("a.test:443",)),
        (("a.test",), ("a.test:443",), ("a.test:443",)),
        (("a.test",), ("a.test:443", "*.test:80"), ("a.test",)),
        (("a.test:22", "b.test"), ("a.test", "b.test:8443"), "none"),
        (("b.test",), ("*.b.test",), "none"),
        (("*.b.test",), ("c.b.test",), ("c.b.test",)),
        (("db.test=10.0.0.7:5432",), ("db.test",), "none"),
        (("x.test",), "none", "none"),
    ],
)
def test_a_network_is_narrowed_to_what_both_allow(network: Network, most: Network, is_left: Network) -> None:
    assert narrowed(network, most) == is_left


ENTRIES = some.from_regex(r"(\*\.)?([ab]\.){1,2}test(:8[0-9])?", fullmatch=True)
NETWORKS = some.sampled_from(["none", "internet"]) | some.lists(ENTRIES, min_size=1, max_size=4).map(tuple)


PLACES = [(f"{host}.test", port) for host in ("a", "b", "a.a", "a.b", "c.b") for port in (22, 80, 81, 443)]


def reach(network: Any) -> set[tuple[str, int]]:
    """Return those of some places that the egress proxy lets through under a policy."""
    policy = Policy.parse(network)
    found: set[tuple[str, int]] = set()
    for host, port in PLACES:
        with contextlib.suppress(Refusal):
            policy.grant(Target(host, port))
            found.add((host, port))
    return found


@given(NETWORKS, NETWORKS)
def test_what_is_left_reaches_what_both_reach(network: Any, most: Any) -> None:
    allowed = set(PLACES) if most == "internet" else reach(most)
    assert reach(narrowed(network, most)) == reach(network) & allowed


@pytest.mark.parametrize(
    "wrong",
    [{"cpu": "many"}, {"memory": "1 GB"}, {"network": "some"}, {"network": []}, {"network": ["https://a.test/"]}],
)
def test_limits_that_cannot_be_read_are_refused_at_the_start(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SpawnLimits.model_validate(wrong)


@pytest.mark.anyio
async def test_a_spawn_that_asks_for_too_much_makes_nothing_and_one_that_gets_less_is_told(
    make_world: MakeWorld,
) -> None:
    world = await make_world(spawn={"network": "none"}, recipe={"network": "internet"})
    with pytest.raises(PermissionDenied, match="ASH_HUB_SPAWN__NETWORK"):
        await world.spawn(network="internet")
    assert await world.backend.list() == []
    made = await world.spawn()
    assert made.warnings[0].startswith("it started with network: none, because this hive allows none (")


@pytest.mark.parametrize(("session", "fine"), [(None, True), ("box1", True), ("Box", False), ("spawn", False)])
def test_a_spawn_may_choose_a_session_name_that_is_one(tmp_path: Path, session: str | None, fine: bool) -> None:
    policy, wanted = policy_of(tmp_path), ask(session=session)
    with contextlib.nullcontext() if fine else pytest.raises(ConfigError, match="cannot be a session name"):
        assert policy.judge(wanted, LOCAL).recipe.name == "test"


def test_a_recipe_that_reaches_no_further_than_the_hive_allows_is_given_as_it_is(tmp_path: Path) -> None:
    own = recipe(network=["a.test"])
    found = policy_of(tmp_path, own, spawn=SpawnLimits(network=("*.test",))).judge(ask(), LOCAL)
    assert found.recipe is own and found.network_note == ""


def test_a_recipe_is_brought_only_where_the_hive_allows_it_and_never_has_a_folder(tmp_path: Path) -> None:
    brought = ask(recipe=recipe().model_dump())
    with pytest.raises(ConfigError, match="by name only; there are: test"):
        policy_of(tmp_path).judge(brought, LOCAL)
    assert isinstance(brought.recipe, Recipe)
    placed = brought.model_copy(update={"recipe": brought.recipe.model_copy(update={"folder": tmp_path})})
    found = policy_of(tmp_path, allow_inline_recipes=True).judge(placed, LOCAL)
    assert found.recipe.name == "test" and found.recipe.folder is None and found.network_note == ""


@pytest.mark.parametrize("brings", [False, True])
def test_an_address_is_named_only_where_the_hive_allows_it(tmp_path: Path, brings: bool) -> None:
    network = ["db.test=10.0.0.7:5432"]
    wanted = ask(recipe=recipe(network=network).model_dump()) if brings else ask(network=network)
    refusing = policy_of(tmp_path, allow_inline_recipes=True)
    with pytest.raises(PermissionDenied, match=r"such as db\.test=10\.0\.0\.7:5432"):
        refusing.judge(wanted, LOCAL)
    assert policy_of(tmp_path, allow_inline_recipes=True, allow_named_addresses=True).judge(wanted, LOCAL)
    assert refusing.judge(ask(network=["db.test"]), LOCAL)


@pytest.mark.parametrize(
    ("asked", "own", "lifetimes"),
    [
        ({}, {}, (100.0, 20.0)),
        ({}, {"ttl_seconds": 70, "idle_seconds": 7}, (70.0, 7.0)),
        ({"ttl_seconds": 200, "idle_seconds": 2}, {"ttl_seconds": 70, "idle_seconds": 7}, (200.0, 2.0)),
    ],
)
def test_lifetimes_are_the_callers_then_the_recipes_then_the_hives(
    tmp_path: Path, asked: dict[str, Any], own: dict[str, Any], lifetimes: tuple[float, float]
) -> None:
    policy = policy_of(tmp_path, ttl_seconds=100, max_ttl_seconds=200, idle_seconds=20)
    assert policy.lifetimes(ask(**asked), recipe(**own)) == lifetimes


def test_nobody_gets_a_longer_life_than_the_hive_allows(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, max_ttl_seconds=200)
    policy.check_ttl(200)
    for too_long in (lambda: policy.check_ttl(201), lambda: policy.lifetimes(ask(ttl_seconds=201), recipe())):
        with pytest.raises(ConfigError, match="at most 200 on this hive, not 201"):
            too_long()


@pytest.mark.parametrize(
    ("network", "most", "is_left"),
    [
        ((), ("a.test",), ()),
        ("none", ("a.test",), "none"),
        (("a.test",), "internet", ("a.test",)),
        ("internet", ("a.test:22", "db.test=10.0.0.7:80", "10.0.0.8:80"), "none"),
        ("internet", ("a.test:22", "b.test", "c.test:443"), ("b.test", "c.test:443")),
        ("internet", ("B.test",), ("B.test",)),
        (("DB.test=10.0.0.7:80",), ("db.test=10.0.0.7:80",), ("DB.test=10.0.0.7:80",)),
        (("db.test=1.1.1.1:80",), ("db.test=1.1.1.1",), "none"),
        (("[fd00::7]:80",), ("[FD00::7]:80",), ("[fd00::7]:80",)),
        (("[fd00::7]:80",), ("[fd00::8]:80",), "none"),
        (("*.b.test",), ("c.b.test:22", "*.b.test:80"), ("*.b.test:80",)),
        (("*.b.test",), ("c.b.test:443", "d.b.test:80"), ("c.b.test:443", "d.b.test:80")),
        (("a.test", "a.test:80"), ("a.test:80",), ("a.test:80",)),
    ],
)
def test_a_network_is_narrowed_at_its_edges(network: Network, most: Network, is_left: Network) -> None:
    assert narrowed(network, most) == is_left


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        ({"node_selectors": None}, {"node_selector": {"zone": "a"}}),
        ({"node_selectors": {"pool": ["a"], "zone": ["b"]}}, {"node_selector": {"zone": "b", "pool": "a"}}),
        ({"cpu": "2"}, {"resources": {"limits": {"memory": "2Gi"}}}),
        ({"memory": "2Gi"}, {"resources": {"limits": {"cpu": "2"}}}),
        ({"images": ["a"]}, {"recipe": {"name": "x", "description": "X.", "server": {"python": "a:b"}}}),
    ],
)
def test_what_has_no_limit_or_keeps_to_it_may_be_asked_for(limits: dict[str, Any], asked: dict[str, Any]) -> None:
    check_limits(SpawnLimits.model_validate(limits), ask(**asked))


def test_each_label_of_a_node_is_checked_and_each_amount() -> None:
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"node_selectors": {"pool": ["a"], "zone": []}}, {"node_selector": {"pool": "a", "zone": "b"}}),
        ({"node_selectors": {}}, {"node_selector": {"pool": "a"}}),
        ({"memory": "1Gi"}, {"resources": {"requests": {"memory": "2Gi"}}}),
        ({"cpu": "1"}, {"recipe": recipe(resources={"requests": {"cpu": "2"}}).model_dump()}),
    ]
    for limits, refused in asked:
        with pytest.raises(PermissionDenied, match=r"allowed: (none|at most 1)"):
            check_limits(SpawnLimits.model_validate(limits), ask(**refused))


OWNER = Principal("ann", spawn_policy='{"network":["a.test","b.test","c.test"]}')
HOLDER = Principal("holder of sbx-1", sandbox=SandboxId("sbx-1"))
CHANGES: list[tuple[Principal, Network, Network, str | None]] = [
    (LOCAL, "none", "none", None),
    (LOCAL, "internet", ("d.test",), None),  # narrower, so that no bound matters
    (LOCAL, "none", ("a.test",), None),
    (LOCAL, "none", ("d.test",), "may not ask for network d.test here; allowed: a.test, b.test"),
    (LOCAL, "none", "internet", "ASH_HUB_SPAWN__NETWORK"),
    (LOCAL, "none", ("a.test=10.0.0.1:443",), "ASH_HUB_ALLOW_NAMED_ADDRESSES"),
    (LOCAL, "none", ("a.test=10.0.0.7:443",), None),  # as its recipe lists it
    (OWNER, "none", ("b.test",), None),
    (OWNER, "none", ("d.test",), "allowed: a.test, b.test"),
    (OWNER, "none", ("a.test=10.0.0.7:443",), "with your key"),
    (HOLDER, "internet", ("a.test",), None),
    (HOLDER, ("a.test",), ("a.test", "b.test"), "for one sandbox only, and may narrow its network (a.test now)"),
    (HOLDER, "none", ("a.test",), "its owner may"),
]


@pytest.mark.parametrize(("who", "before", "after", "refusal"), CHANGES)
def test_whoever_may_call_narrows_and_only_the_owner_widens_within_every_bound(
    tmp_path: Path, who: Principal, before: Network, after: Network, refusal: str | None
) -> None:
    own = recipe(network=["a.test=10.0.0.7:443"])
    policy = policy_of(tmp_path, own, spawn=SpawnLimits(network=("a.test", "b.test", "a.test=10.0.0.7:443")))
    if refusal is None:
        policy.check_network_change(before, after, "test", who)
    else:
        with pytest.raises(PermissionDenied) as denied:
            policy.check_network_change(before, after, "test", who)
        assert refusal in denied.value.message


def test_a_key_bounds_what_its_owner_widens_where_the_hive_does_not(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    policy.check_network_change("none", ("c.test",), "unknown", OWNER)
    with pytest.raises(PermissionDenied, match=r"with your key; allowed: a\.test, b\.test, c\.test"):
        policy.check_network_change("none", "internet", "unknown", OWNER)
    with pytest.raises(ConfigError, match="too wide"):
        policy.check_network_change("internet", ("*.com",), "unknown", LOCAL)


def test_an_image_over_rest_is_judged_by_its_name_and_gets_the_network_that_is_allowed(tmp_path: Path) -> None:
    own = recipe(network="internet", server={"image": {"port": 3000}})
    policy = policy_of(tmp_path, spawn=SpawnLimits(images=("team/*",), network="none"))
    found = policy.judge(ImageAsk(recipe=own, image="team/x"), LOCAL)
    assert found.recipe.network == "none" and found.recipe.server == own.server
    assert found.network_note.startswith("network: none, because this hive allows none")
    with pytest.raises(PermissionDenied, match=r"image other .*allowed: team/\*"):
        policy.judge(ImageAsk(recipe=own, image="other"), LOCAL)
    with pytest.raises(PermissionDenied, match="with your key"):
        policy.judge(ImageAsk(recipe=own, image="team/x"), Principal("ann", spawn_policy='{"images":[]}'))
