"""Whom a command can run as: the users of a sandbox, by its own files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypedDict

import pytest

from ash_recipes.runner.problems import Problem
from ash_recipes.runner.users import User, find_user

PASSWD = "root:x:0:0:root:/root:/bin/bash\nann:x:1234:1234::/home/ann:/bin/sh\nbroken\nodd:x:y:1::/:/bin/sh\n"
GROUP = "ann:x:1234:\nwheel:x:7:root,ann\nother:x:9:bob\n"


class Files(TypedDict):
    """Where the users and groups of a test are."""

    passwd: str
    group: str


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "passwd").write_text(PASSWD)
    (tmp_path / "group").write_text(GROUP)
    return {"passwd": str(tmp_path / "passwd"), "group": str(tmp_path / "group")}


def test_a_user_comes_with_its_groups_and_home(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = find_user("ann", **files)
    assert found == User("ann", 1234, 1234, (1234, 7), "/home/ann")
    assert found is not None and found.variables == {"USER": "ann", "LOGNAME": "ann", "HOME": "/home/ann"}


def test_the_user_that_commands_run_as_anyway_is_nothing_to_change(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert find_user("ann", **files) is None


@pytest.mark.parametrize("name", ["bob", "odd", "", "1234"])
def test_a_user_that_is_not_there_is_refused_with_those_that_are(
    files: Files, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Problem, match="it has root, ann; `useradd` makes others") as refused:
        find_user(name, **files)
    assert refused.value.kind == "bad_request"


@pytest.mark.parametrize("number", ["5000000000", "9" * 5000, "4294967295"], ids=len)
def test_a_number_that_no_user_can_have_is_no_user(files: Files, number: str) -> None:
    Path(files["passwd"]).write_text(f"big:x:{number}:0::/:/bin/sh\n")
    with pytest.raises(Problem, match="no user 'big'"):
        find_user("big", **files)


def test_where_nobody_is_root_commands_run_as_one_user(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 5)
    with pytest.raises(Problem, match="nobody is root in this sandbox") as refused:
        find_user("ann", **files)
    assert refused.value.kind == "not_permitted"
