"""Which subordinate users an ordinary user has, and what sandboxes have of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from ash_hub.backends.local import ordinary_host
from ash_hub.backends.local.keeper.launchers.plan import Subordinate
from ash_hub.backends.local.keeper.launchers.subordinate import range_runs
from ash_hub.backends.local.ordinary import files_for, name_of_copy
from ash_hub.backends.local.refusals import namespace_fix
from ash_hub.backends.local.subordinates import LEAST_EACH, own_subordinates, ranges_in, runs_of
from tests.hub.backends.local.local_parts import settings_in


def given(tmp_path: Path, users: str, groups: str | None = None) -> tuple[str, str]:
    paths = tmp_path / "subuid", tmp_path / "subgid"
    for path, text in zip(paths, (users, users if groups is None else groups), strict=True):
        path.write_text(text)
    return str(paths[0]), str(paths[1])


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("newuidmap", "newgidmap"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_the_usual_count_gives_a_thousand_sandboxes_65_each() -> None:
    assert ranges_in(65_536, 1000) == (65, 1008) and ranges_in(65_536, 200) == (327, 200)
    assert ranges_in(65_536, 5000) == (65, 1008) and ranges_in(66, 1) == (65, 1)


@pytest.mark.parametrize("each", [LEAST_EACH, 327, 32_768])
def test_a_range_has_root_the_systems_users_some_of_its_own_and_nobody(each: int) -> None:
    runs = runs_of(each)
    inside = [number for first, count in runs for number in range(first, first + count)]
    assert len(inside) == len(set(inside)) == each
    assert {0, 1, 13, 33, 42, 46, 50, 60, 100, 107, 1000, 1007, 65_534} <= set(inside) and 2 not in inside


def test_ranges_of_two_sandboxes_have_the_copys_owner_in_common_and_nobody_else() -> None:
    users = Subordinate(100_000, 100_000, 65_536, runs_of(65), 2)
    outside: list[set[int]] = []
    for first in (2, 67):
        rows = [[int(word) for word in line.split()] for line in range_runs(users, first).splitlines()]
        outside.append({number for _, begin, count in rows for number in range(begin, begin + count)})
    assert outside[0] & outside[1] == {1} and 0 not in outside[0] | outside[1]


def test_the_largest_run_counts_and_the_shorter_of_both_files(programs: Path) -> None:
    user = os.geteuid()
    files = given(programs, f"other:1:5\n{user}:300000:100\n{user}:500000:70000\n", f"{user}:700000:65536\n")
    assert own_subordinates(files) == Subordinate(500_000, 700_000, 65_536, owner=2)


def test_who_has_none_is_told_which_to_take(programs: Path) -> None:
    problem = own_subordinates(given(programs, "other:100000:65536\n"))
    assert isinstance(problem, str) and "sudo usermod --add-subuids" in problem
    problem = own_subordinates(given(programs, f"{os.geteuid()}:300000:65\n"))
    assert isinstance(problem, str) and "65 subordinate users are too few" in problem


def test_who_lacks_the_programs_is_told_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = own_subordinates(given(tmp_path, f"{os.geteuid()}:300000:65536\n"))
    assert isinstance(problem, str) and "newuidmap and newgidmap not installed" in problem and "uidmap" in problem


def test_programs_are_told_which_users_there_are(tmp_path: Path) -> None:
    (tmp_path / "login.defs").write_text("UMASK 022\n#UID_MIN 5\nUID_MIN 500\nSYS_UID_MAX 999\n")
    files = files_for(runs_of(65), tmp_path)
    lines = files["/etc/login.defs"].splitlines()
    assert {"UMASK 022", "UID_MIN 1000", "UID_MAX 1007", "SYS_GID_MIN 100", "SYS_UID_MAX 107"} <= set(lines)
    assert "UID_MIN 500" not in lines and "SYS_UID_MAX 999" not in lines
    assert "LAST_SYSTEM_UID=107" in files["/etc/adduser.conf"] and "FIRST_GID=1000" in files["/etc/adduser.conf"]
    assert list(files_for(((0, 1),))) == ["/etc/apt/apt.conf.d/96ash-user"]


def test_a_copy_has_another_name_for_other_users_and_another_choice_of_paths() -> None:
    users = Subordinate(100_000, 100_000, 65_536)
    names = {name_of_copy({}, each, without) for each in (users, Subordinate()) for without in ((), ("/usr/src",))}
    assert len(names) == 4 and name_of_copy({}, users, ()) in names


def test_what_is_left_out_can_be_a_variable_of_the_environment(tmp_path: Path) -> None:
    assert settings_in(tmp_path, system_without='["/usr/a"]').system_without == ("/usr/a",)
    with pytest.raises(ValidationError, match="must be JSON"):
        settings_in(tmp_path, system_without="/usr/a")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ok", None),
        ("overlay: Operation not permitted", "Linux 5.11"),
        ("namespaces: Permission denied", "user namespaces"),
        ("users: newuidmap gives no subordinate users: x", "newuidmap gives"),
    ],
)
def test_a_refusal_has_its_true_reason(monkeypatch: pytest.MonkeyPatch, said: str, told: str | None) -> None:
    monkeypatch.setattr(ordinary_host, "_TRIAL", f"print({said!r})")
    problem = ordinary_host.tried(Subordinate())
    assert problem is None if told is None else told in (problem or "")


def test_apparmor_is_told_the_program_that_needs_a_profile() -> None:
    fix = namespace_fix("/opt/py/bin/python3.11", lambda name: "1" if "apparmor" in name else "")
    assert "profile python3.11 /opt/py/bin/python3.11 flags=(unconfined)" in fix


def test_copies_are_in_the_users_cache_unless_settings_say_where(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, system_dir=None)
    assert ordinary_host.system_directory(settings, {"XDG_CACHE_HOME": "/c"}) == Path("/c/ash/systems")
    assert ordinary_host.system_directory(settings_in(tmp_path, system_dir=tmp_path)) == tmp_path
