"""What a principal may have at once: a key narrows what the hive allows and never widens it."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as some

from ash_hub.cli.keys import key
from ash_hub.settings import HubSettings
from ash_mcp.types import PrincipalLimits
from ash_router.bounds.effective_limits import EffectiveLimit, Kind, optional_limit

NUMBERS = some.none() | some.integers(0, 10)


@given(NUMBERS, NUMBERS)
def test_a_key_narrows_what_the_hive_allows_and_never_widens_it(hive: int | None, of_key: int | None) -> None:
    limit = optional_limit(hive, of_key)
    given = [most for most in (hive, of_key) if most is not None]
    assert (None if limit is None else limit.most) == (min(given) if given else None)
    if limit is not None and limit.by_key:
        assert of_key is not None and (hive is None or of_key < hive)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_refusal_says_whose_limit_it_was_how_much_and_how_to_have_more(kind: Kind) -> None:
    setting = f"{kind}_per_owner"
    assert setting in type(HubSettings().limits).model_fields
    of_hive = EffectiveLimit(7).reached(kind)
    assert f"ASH_HUB_LIMITS__{setting.upper()}" in of_hive.message and "7" in of_hive.message
    of_key = EffectiveLimit(7, by_key=True).reached(kind)
    assert f"--max-{kind} (ash key new)" in of_key.message and "your key" in of_key.message
    assert (of_hive.data["limit"], of_key.data["limit"]) == ("owner", "key")
    assert of_hive.retry_after_seconds == of_key.retry_after_seconds > 0


def test_settings_and_keys_and_their_options_have_one_vocabulary() -> None:
    kinds = set(get_args(Kind))
    assert set(PrincipalLimits.__dataclass_fields__) == kinds
    (new,) = [command for command in key.registered_commands if command.callback.__name__ == "new"]  # type: ignore[union-attr]
    options = {name.removeprefix("max_") for name in new.callback.__annotations__ if name.startswith("max_")}  # type: ignore[union-attr]
    assert options == kinds
