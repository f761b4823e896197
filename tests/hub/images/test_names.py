"""Names of images are read as docker reads them."""

from __future__ import annotations

import pytest

from ash_hub.images.names import full_name, short_name
from ash_mcp.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("python", "docker.io/library/python:latest", "python:latest"),
        ("python:3.12-slim", "docker.io/library/python:3.12-slim", "python:3.12-slim"),
        ("docker.io/python", "docker.io/library/python:latest", "python:latest"),
        ("team/tool", "docker.io/team/tool:latest", "team/tool:latest"),
        ("localhost/ash/hub:dev", "localhost/ash/hub:dev", "localhost/ash/hub:dev"),
        ("registry.test:5000/a/b_c:1", "registry.test:5000/a/b_c:1", "registry.test:5000/a/b_c:1"),
        (f"a@sha256:{'0' * 64}", f"docker.io/library/a@sha256:{'0' * 64}", f"a@sha256:{'0' * 64}"),
        ("index.docker.io/library/a:1", "docker.io/library/a:1", "a:1"),
        ("library/a/b", "docker.io/library/a/b:latest", "docker.io/library/a/b:latest"),
        ("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest"),
    ],
)
def test_a_name_is_completed(text: str, full: str, short: str) -> None:
    assert (full_name(text), short_name(full_name(text))) == (full, short)
    assert full_name(short) == full


@pytest.mark.parametrize(
    "text", ["", "UPPER", "a b", "../x", "a//b", "-x", "a:", "a@md5:1", "x" * 500, "--flag", "a\n"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no name of an image"):
        full_name(text)
