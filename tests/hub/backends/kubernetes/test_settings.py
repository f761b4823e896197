"""Settings that are no plain words, given as variables of the environment."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ash_hub.backends.kubernetes.settings import KubernetesSettings


def test_a_variable_of_its_own_may_hold_json() -> None:
    given = {"pod_template": '{"spec": {"a": 1}}', "node_selector": '{"b": "c"}', "image_pull_secrets": '["d"]'}
    settings = KubernetesSettings.model_validate(given)
    assert settings.pod_template == {"spec": {"a": 1}}
    assert (settings.node_selector, settings.image_pull_secrets) == ({"b": "c"}, ("d",))


def test_a_variable_that_is_no_json_is_named() -> None:
    with pytest.raises(ValidationError, match=r"pod_template\n.*must be JSON"):
        KubernetesSettings.model_validate({"pod_template": "spec: {}"})
