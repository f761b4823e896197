"""Amounts, what the host enforces of them, and control groups."""

from __future__ import annotations

from pathlib import Path

from ash_hub.backends.local.keeper import cgroups
from ash_hub.backends.local.limits import Enforcement, Limits, limits_of
from ash_hub.backends.local.settings import LocalSettings
from ash_mcp.types import ResourceAmounts, Resources, SandboxId, SandboxSpec

MIB = 1024 * 1024
SETTINGS = LocalSettings(state_dir=Path("/s"), run_dir=Path("/r"), log_dir=Path("/l"))
EVERYTHING = frozenset({"memory", "pids", "cpu"})


def limits(memory: str | None = None, cpu: str | None = None) -> Limits:
    resources = Resources(limits=ResourceAmounts(cpu=cpu, memory=memory))
    return limits_of(SandboxSpec(id=SandboxId("sbx-x"), recipe="x", server={}, resources=resources), SETTINGS)


def enforcement(version: int, controllers: frozenset[str], *, namespaced: bool = False) -> Enforcement:
    return Enforcement(version=version, controllers=controllers, namespaced_processes=namespaced)


def test_files_leave_room_for_processes_however_small_the_memory_is() -> None:
    for memory in (96, 128, 1024, 2048, 4096):
        chosen = limits(memory=f"{memory}Mi")
        places = (chosen.workspace_bytes, chosen.home_bytes, chosen.tmp_bytes, chosen.shm_bytes)
        assert sum(places) <= (memory - 88) * MIB
        assert all(size > 0 and size % 4096 == 0 for size in places)  # a tmpfs of size 0 has no bound
        assert places[0] >= places[2] >= places[1] >= places[3]
    assert limits(memory="2Gi").workspace_bytes == SETTINGS.workspace_bytes


def test_a_spawn_chooses_its_limits_and_settings_the_rest() -> None:
    chosen = limits(memory="128Mi")
    assert chosen.memory_bytes == 128 * MIB and chosen.cpu == SETTINGS.cpu
    assert limits(cpu="250m").cpu == 0.25


def test_what_control_groups_hold_is_not_warned_of() -> None:
    assert enforcement(2, EVERYTHING).warnings() == []
    assert "DATA" not in enforcement(2, EVERYTHING).rlimits(limits())


def test_without_control_groups_each_limit_is_said_to_be_weak() -> None:
    bare = enforcement(0, frozenset())
    assert len(bare.warnings()) == 4 and all("can be used here" in sentence for sentence in bare.warnings())
    assert bare.rlimits(limits(memory="128Mi"))["DATA"] == 128 * MIB
    assert not bare.inner_processes
    namespaced = enforcement(0, frozenset(), namespaced=True)
    assert namespaced.inner_processes and not any("number of processes" in it for it in namespaced.warnings())


def test_the_keeper_is_told_only_of_limits_that_are_wanted() -> None:
    told = enforcement(1, EVERYTHING).for_keeper(limits(memory="128Mi", cpu="2"))
    assert told == {"controllers": ["cpu", "memory", "pids"], "memory_bytes": 128 * MIB, "processes": 512, "cpu": 2.0}
    assert enforcement(1, frozenset({"pids"})).for_keeper(limits()) == {"controllers": ["pids"], "processes": 512}


MOUNTS_V1 = """\
30 25 0:26 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw
31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct
32 25 0:28 /box /sys/fs/cgroup/memory rw shared:6 - cgroup cgroup rw,memory
33 25 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
"""


def test_the_own_group_is_found_in_version_1() -> None:
    memberships = "4:pids:/\n3:memory:/box/mine\n2:cpu,cpuacct:/user\n1:name=systemd:/\n0::/user.slice\n"
    own, groups = cgroups.find(memberships, MOUNTS_V1)
    assert own == "/sys/fs/cgroup/unified/user.slice"
    assert groups == {
        "pids": "/sys/fs/cgroup/pids",
        "memory": "/sys/fs/cgroup/memory/mine",
        "cpu": "/sys/fs/cgroup/cpu,cpuacct/user",
    }


def test_the_own_group_is_found_in_version_2() -> None:
    mounts = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
    assert cgroups.find("0::/user.slice/ash.scope\n", mounts) == ("/sys/fs/cgroup/user.slice/ash.scope", {})


def test_a_group_outside_of_what_is_mounted_is_taken_at_its_mount_point() -> None:
    assert cgroups.find("3:memory:/elsewhere\n", MOUNTS_V1)[1] == {"memory": "/sys/fs/cgroup/memory"}


def kernel_files(path: Path, *names: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).touch()


def test_a_group_of_version_2_is_written_as_the_kernel_reads_it(tmp_path: Path) -> None:
    group = cgroups.Hierarchy(2, dict.fromkeys(EVERYTHING, str(tmp_path))).group("sbx-x")
    kernel_files(tmp_path / "sbx-x", "memory.max", "memory.swap.max", "pids.max", "cpu.max")
    held = group.create({"memory_bytes": 64 * MIB, "processes": 100, "cpu": 0.5})
    assert sorted(held) == sorted(EVERYTHING)
    written = {path.name: path.read_text() for path in (tmp_path / "sbx-x").iterdir()}
    assert written == {
        "memory.max": str(64 * MIB),
        "memory.swap.max": "0",
        "pids.max": "100",
        "cpu.max": "50000 100000",
    }
    assert group.entrances() == [str(tmp_path / "sbx-x" / "cgroup.procs")]


def test_a_group_says_which_limits_the_kernel_took(tmp_path: Path) -> None:
    group = cgroups.Hierarchy(2, dict.fromkeys(EVERYTHING, str(tmp_path))).group("sbx-x")
    kernel_files(tmp_path / "sbx-x", "memory.max")
    assert group.create({"memory_bytes": 64 * MIB, "processes": 100, "cpu": 0.5}) == ["memory"]


def test_kills_for_want_of_memory_are_counted(tmp_path: Path) -> None:
    for version, name in ((2, "memory.events"), (1, "memory.oom_control")):
        group = cgroups.Hierarchy(version, {"memory": str(tmp_path)}).group("sbx-x")
        assert group.oom_kills() == 0
        (tmp_path / "sbx-x").mkdir(exist_ok=True)
        (tmp_path / "sbx-x" / name).write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
        assert group.oom_kills() == 3
