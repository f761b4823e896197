"""What `ash doctor` finds on hosts that lack something."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from ash_hub.backends.checks import Check
from ash_hub.backends.local import host
from ash_hub.backends.local.keeper.launchers.plan import Subordinate
from ash_hub.backends.local.ordinary import OrdinaryMachine, with_ranges
from tests.hub.backends.local.local_parts import needs_isolation, settings_in

BROKEN = """\
#!/bin/sh
case "$1" in
  --help) echo "    --size BYTES"; exit 0 ;;
  --version) echo "bubblewrap 0.6.1"; exit 0 ;;
esac
echo "bwrap: setting up uid map: Permission denied" >&2
exit 1
"""


def a_socket_for_cores(_: str) -> str:
    return "@/run/core"


def no_overlays(_: Sequence[str]) -> frozenset[str]:
    return frozenset({"seal"})


def none_over_usr(directories: Sequence[str]) -> frozenset[str]:
    return frozenset({*directories, "seal"} - {"/usr"})


def no_binds(directories: Sequence[str]) -> frozenset[str]:
    return frozenset(directories)


def found(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a bubblewrap first that may not make namespaces."""
    program = tmp_path / "bwrap"
    program.write_text(BROKEN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@needs_isolation
def test_this_host_isolates() -> None:
    checks = found(host.probe())
    assert checks["bubblewrap"].ok and checks["namespaces"].ok
    assert all(check.ok for check in checks.values() if check.required)
    assert all(check.ok or check.fix for check in checks.values())


def test_a_host_without_bubblewrap_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(host.probe())["bubblewrap"]
    assert not check.ok and check.required and check.fix is not None and "apt-get install bubblewrap" in check.fix


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("sysctl", "value", "advice"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "/etc/apparmor.d/bwrap"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces"),
        ("none/of/them", "", "--security-opt"),
    ],
)
def test_a_host_that_forbids_namespaces_is_told_which_switch_it_is(
    monkeypatch: pytest.MonkeyPatch, sysctl: str, value: str, advice: str
) -> None:
    def read(name: str) -> str:
        return value if name == sysctl else ""

    monkeypatch.setattr(host, "_sysctl", read)
    check = found(host.probe())["namespaces"]
    assert not check.ok and check.required
    assert "setting up uid map: Permission denied" in check.detail
    assert check.fix is not None and advice in check.fix


@pytest.mark.usefixtures("broken")
def test_an_old_bubblewrap_is_said_to_lack_what_it_lacks() -> None:
    checks = found(host.probe())
    assert "0.6.1" in checks["bubblewrap"].detail
    assert checks["disk limits"].ok
    assert "filter only" in checks["nested namespaces"].detail and checks["nested namespaces"].fix


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("part", "value", "names", "advice"),
    [
        ("seccomp.ARCHITECTURES", dict[str, object](), ["system call filter"], "x86_64"),
        ("_mounts", no_overlays, ["mount table", "files of the system"], "let Python mount overlays"),
        ("_mounts", none_over_usr, ["files of the system"], "mount nothing below /usr"),
        ("_mounts", no_binds, ["device nodes"], "let Python make"),
        ("_sysctl", a_socket_for_cores, ["core dumps"], "kernel.core_pattern"),
        (
            "cgroups.usable",
            lambda: (0, frozenset[str]()),
            ["memory limits", "processor time limits", "file count limits"],
            "Delegate=yes",
        ),
        ("cgroups.usable", lambda: (2, frozenset({"memory", "pids"})), ["processor time limits"], "Delegate=yes"),
        ("sys.version_info", (3, 10, 0), ["python"], "Python 3.11"),
        ("sys.platform", "darwin", ["linux"], "on Linux"),
    ],
    ids=[
        "no filter",
        "no overlays",
        "something mounted below /usr",
        "no binds",
        "a socket for cores",
        "no groups",
        "no processor group",
        "an old Python",
        "another system",
    ],
)
def test_a_host_that_lacks_a_part_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, part: str, value: object, names: list[str], advice: str
) -> None:
    before = found(host.probe())
    monkeypatch.setattr(f"ash_hub.backends.local.host.{part}", value)
    checks = found(host.probe())
    for name in names:
        assert not checks[name].ok and advice in (checks[name].fix or ""), checks[name]
    lost = {name for name, check in checks.items() if before[name].ok and not check.ok}
    assert lost <= {*names, "processes limits", "nested namespaces"}


@pytest.mark.parametrize(
    ("pattern", "hard", "may_raise", "starts"),
    [
        ("|/bin/program %P", 0, False, True),
        ("|/bin/program %P", 0, True, False),
        ("|/bin/program %P", 1, False, False),
        ("|/bin/program %P", -1, False, False),
        ("core", 0, False, False),
    ],
)
def test_a_hard_limit_of_no_cores_is_said_to_start_the_host_s_program(
    monkeypatch: pytest.MonkeyPatch, pattern: str, hard: int, may_raise: bool, starts: bool
) -> None:
    def sysctl(name: str) -> str:
        return pattern if name == "kernel/core_pattern" else ""

    def limit(_: int) -> tuple[int, int]:
        return 0, hard

    monkeypatch.setattr(host, "_sysctl", sysctl)
    monkeypatch.setattr(host, "may_raise_limits", lambda: may_raise)
    monkeypatch.setattr("ash_hub.backends.local.host.resource.getrlimit", limit)
    check = found(host.probe())["core dumps"]
    assert check.ok is not starts and host.host_facts().core_program is starts
    assert check.ok or "hard core 1" in (check.fix or "")


def test_what_all_sandboxes_share_is_named() -> None:
    quotas = found(host.probe())["kernel quotas"]
    assert not quotas.ok and not quotas.required
    for name in ("inotify", "epoll", "pipe pages", "descriptors in flight", "pseudoterminals"):
        assert name in quotas.detail


def test_a_host_that_can_have_no_machines_says_what_is_lost_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "geteuid", lambda: 0)
    monkeypatch.setattr(host, "machine_problem", lambda *_: "the kernel is old")  # pyright: ignore
    check = found(host.probe(settings_in(tmp_path)))["ordinary machine"]
    assert not check.ok and not check.required
    assert "read-only" in check.detail and "the kernel is old" in check.detail and "Linux 5.19" in (check.fix or "")


def test_the_configured_block_of_users_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "geteuid", lambda: 0)
    monkeypatch.setattr(host, "machine_problem", lambda *_: None)  # pyright: ignore
    checks = found(host.probe(settings_in(tmp_path, first_user=0x6000_0000, users=4 * 65_536, max_sandboxes=4)))
    assert checks["users of sandboxes"].detail == "from 1610612736 on, 262144 in all, for 4 sandboxes"
    checks = found(host.probe(settings_in(tmp_path, max_sandboxes=5000)))
    assert not checks["ordinary machine"].ok and "5000 sandboxes need" in checks["users of sandboxes"].detail


def test_an_ordinary_user_is_told_what_its_sandboxes_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = Subordinate(100_000, 100_000, 65_536, owner=2)
    alone = OrdinaryMachine(users=Subordinate(), lacks="run `usermod`")
    machines = iter((with_ranges(users, tmp_path / "lock", 200), alone, "no namespaces"))
    monkeypatch.setattr(host.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(host, "find_ordinary", lambda *_: next(machines))  # pyright: ignore
    settings = settings_in(tmp_path, machine=True, system_dir=tmp_path / "systems")
    ranges, lonely, none = (found(host.probe(settings)) for _ in range(3))
    assert "with 327 users" in ranges["ordinary machine"].detail and ranges["kernel quotas"].ok
    assert "which the next hive makes" in ranges["ordinary machine"].detail
    assert ranges["users of sandboxes"].ok and "for each of 200 sandboxes" in ranges["users of sandboxes"].detail
    assert lonely["ordinary machine"].ok and not lonely["kernel quotas"].ok
    assert lonely["users of sandboxes"].fix == "run `usermod`"
    assert not none["ordinary machine"].ok and "no namespaces" in none["ordinary machine"].detail


@pytest.mark.parametrize(
    ("first", "count", "machines", "told"),
    [
        (0x7000_0000, 65_536, 2, "2 sandboxes need 131072 users"),
        (0x7FFF_0000, 131_072, 2, "go beyond 2147483646"),
        (100_000, 65_536, 1, "that /etc/subuid gives to somebody"),
        (65_536, 65_536, 1, None),
        (0, 65_536, 1, "include root (0)"),
    ],
)
def test_a_block_of_users_that_others_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, first: int, count: int, machines: int, told: str | None
) -> None:
    def subordinate(path: str) -> list[tuple[str, int, int]]:
        return [("somebody", 150_000, 10)] if path == "/etc/subuid" else []

    monkeypatch.setattr(host, "subordinate_lines", subordinate)
    problem = host.user_block_problem(first, count, machines)
    assert problem is None if told is None else told in (problem or "")


def test_a_host_without_redis_is_told_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = found(host.probe())["redis-server"]
    assert check.ok and "only several replicas of a hive need it" in check.detail
