"""Launch plans and what bubblewrap is told of them: pure, so looked at without starting anything."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from ash_hub.backends.local.keeper.launchers.bubblewrap import mount_names, options_for
from ash_hub.backends.local.keeper.launchers.plan import Plan
from ash_hub.backends.local.limits import Enforcement, limits_of
from ash_hub.backends.local.plans import HostFacts, IsolatedPlans, UnsafePlans
from ash_hub.backends.local.runtime import Runtime, compile_runner, find_runtime
from ash_hub.backends.local.settings import LocalSettings
from ash_mcp.types import SandboxId, SandboxSpec

SETTINGS = LocalSettings(state_dir=Path("/s"), run_dir=Path("/r"), log_dir=Path("/l"))
HOST = HostFacts(
    options=frozenset({"--size", "--disable-userns"}),
    links={"/bin": "usr/bin"},
    directories=("/usr", "/lib64"),
    masked=("/proc/kcore",),
    seccomp=b"filter",
    own_inodes=True,
    seals=True,
)
SPEC = SandboxSpec(
    id=SandboxId("sbx-x"),
    recipe="general",
    server={"python": "m:o"},
    env={"NAME": "@fd:listen@"},
    public_key="key",
    mounts={"/opt/recipe": "/home/somebody/recipe"},
)
HOME_RUNTIME = Runtime(
    python="/opt/ash/python/bin/python3.11",
    host_python="/home/somebody/bin/python3.11",
    arguments=("-m", "runner"),
    binds={"/opt/ash/python": "/home/somebody", "/opt/ash/site": "/home/somebody/site"},
    hidden=("/opt/ash/site/x.pth",),
    python_path=("/opt/ash/site",),
    host_python_path=("/home/somebody/site",),
)
SYSTEM_RUNTIME = Runtime(python="/usr/bin/python3", host_python="/usr/bin/python3", arguments=("-m", "runner"))
BARE = Enforcement(version=0, controllers=frozenset(), namespaced_processes=True)
FULL = Enforcement(version=2, controllers=frozenset({"memory", "pids", "cpu"}), namespaced_processes=True)


def plan(host: HostFacts = HOST, runtime: Runtime = HOME_RUNTIME, enforcement: Enforcement = FULL) -> Plan:
    return IsolatedPlans(host, enforcement, Path("/run/ash/x")).plan(SPEC, runtime, limits_of(SPEC, SETTINGS))


def warnings(host: HostFacts) -> list[str]:
    return list(IsolatedPlans(host, FULL, Path("/r")).warnings)


def words(plan: Plan, known: frozenset[str] = HOST.options) -> tuple[str, ...]:
    return tuple(options_for(plan, mount_names(plan), known))


def pairs(words: tuple[str, ...], option: str, width: int = 2) -> list[tuple[str, ...]]:
    return [words[i + 1 : i + 1 + width] for i, word in enumerate(words) if word == option]


def test_a_plan_is_the_same_after_its_way_to_the_keeper() -> None:
    made = plan(replace(HOST, overlays=True))
    there = json.loads(json.dumps(replace(made, descriptors={"listen": 7}, group_entrances=("/g",)).to_json()))
    assert Plan.from_json(there) == made
    unsafe = UnsafePlans(BARE, Path("/run/ash/x")).plan(SPEC, HOME_RUNTIME, limits_of(SPEC, SETTINGS))
    assert Plan.from_json(json.loads(json.dumps(unsafe.to_json()))) == unsafe


def test_the_keeper_is_told_of_a_launcher_in_data() -> None:
    told = IsolatedPlans(HOST, FULL, Path("/r")).launcher
    assert told == {"kind": "bubblewrap", "program": "/usr/bin/bwrap", "options": ["--disable-userns", "--size"]}
    assert UnsafePlans(BARE, Path("/r")).launcher == {"kind": "unsafe"}


def test_the_command_line_has_nothing_of_the_host_or_the_recipe() -> None:
    command = " ".join(plan().command)
    assert "somebody" not in command and "general" not in command and "sbx" not in command


def test_every_namespace_is_new_and_no_privilege_stays() -> None:
    options = set(words(plan()))
    assert options >= {"--unshare-all", "--unshare-user", "--disable-userns", "--new-session"}
    assert "--share-net" not in options and "--as-pid-1" in options
    assert pairs(words(plan()), "--cap-drop", 1) == [("ALL",)]
    assert pairs(words(plan()), "--seccomp", 1) == [("@fd:seccomp@",)] and plan().system_call_filter == b"filter"


def test_nothing_of_the_host_is_bound_writable() -> None:
    assert not {"--bind", "--bind-try", "--dev-bind", "--dev-bind-try"} & set(words(plan()))
    sources = [source for source, _ in pairs(words(plan()), "--ro-bind")]
    assert sources == ["/usr", "/lib64", "/dev/null", "/home/somebody", "/home/somebody/site", "/home/somebody/recipe"]


def test_bound_directories_come_under_names_of_the_keeper_where_the_host_lets_it() -> None:
    made = plan(replace(HOST, overlays=True, own_inodes=False))
    assert mount_names(plan()) == {}
    assert mount_names(made) == {
        "/home/somebody": os.path.abspath("v/0"),
        "/home/somebody/recipe": os.path.abspath("v/1"),
        "/home/somebody/site": os.path.abspath("v/2"),
    }
    assert not any("somebody" in word for word in words(made))
    assert (os.path.abspath("v/1"), "/opt/recipe") in pairs(words(made), "--ro-bind")


def test_the_systems_directories_come_under_names_of_the_keeper_too_where_the_host_lets_it() -> None:
    etc = {"/etc/localtime": "/usr/share/zoneinfo/UTC", "/etc/services": "/etc/services", "/etc/pki": "/srv/pki"}
    made = plan(replace(HOST, overlays=True, etc=etc))
    shown = mount_names(made)
    assert {"/usr", "/lib64", "/etc"} < set(shown)
    assert {(shown["/usr"], "/usr"), (shown["/lib64"], "/lib64")} < set(pairs(words(made), "--ro-bind"))
    assert pairs(words(made), "--ro-bind-try") == [
        (f"{shown['/usr']}/share/zoneinfo/UTC", "/etc/localtime"),
        (f"{shown['/etc']}/services", "/etc/services"),
        ("/srv/pki", "/etc/pki"),
    ]
    shared = replace(HOST, overlays=True, own_inodes=False)
    assert "/usr" not in mount_names(plan(shared)) and ("/usr", "/usr") in pairs(words(plan(shared)), "--ro-bind")
    assert any("/usr are shared" in sentence for sentence in warnings(shared))


def test_device_nodes_are_sealed_where_the_host_lets_it_and_else_it_is_said() -> None:
    open_ = replace(HOST, seals=False)
    for host, sealed in ((HOST, True), (open_, False)):
        assert [mount.sealed for mount in plan(host).mounts if mount.kind == "devices"] == [sealed]
    assert any("device nodes" in sentence for sentence in warnings(open_))


def test_a_program_of_the_host_that_gets_cores_is_named() -> None:
    told = replace(HOST, core_program=True)
    assert any("cores go to" in sentence for sentence in warnings(told))


def test_the_root_is_made_read_only_after_everything_is_in_it() -> None:
    args = words(plan())
    last_mount = max(index for index, word in enumerate(args) if word in ("--tmpfs", "--ro-bind", "--file"))
    assert all(args.index("--remount-ro") > index for index in (last_mount,))
    assert pairs(words(plan()), "--remount-ro", 1) == [("/proc",), ("/dev",), ("/",)]


def test_every_writable_place_has_a_size() -> None:
    args = words(plan())
    for index, word in enumerate(args):
        if word == "--tmpfs":
            assert args[index - 4] == "--size" and int(args[index - 3]) > 0
    assert {path for (path,) in pairs(words(plan()), "--tmpfs", 1)} == {"/tmp", "/dev/shm", "/home/ash", "/workspace"}


def test_an_old_bubblewrap_gets_no_option_that_it_does_not_know_and_a_warning() -> None:
    old = replace(HOST, options=frozenset[str]())
    assert not {"--size", "--disable-userns"} & set(words(plan(old), old.options))
    assert any("disk space" in sentence for sentence in warnings(old))
    assert warnings(HOST) == []


def test_a_machine_without_a_filter_is_warned_of() -> None:
    unfiltered = replace(HOST, seccomp=None)
    assert "--seccomp" not in words(plan(unfiltered))
    assert any("not filtered" in sentence for sentence in warnings(unfiltered))


def test_the_runner_is_told_what_its_contract_says_and_a_recipe_cannot_forge_a_descriptor() -> None:
    told = plan().environment
    assert told["ASH_LISTEN_FD"] == "@fd:listen@"
    assert json.loads(told["ASH_RUNNER_CONFIG"]) == {
        "sandbox_id": "sbx-x",
        "recipe": "general",
        "public_key": "key",
        "server": {"python": "m:o"},
        "env": {"NAME": "@fd:listen@"},
        "workspace": "/workspace",
        "home": "/home/ash",
    }
    assert [value for value in told.values() if value.startswith("@")] == ["@fd:listen@"]
    assert not any("somebody" in value for value in told.values())


def test_the_hive_s_python_comes_last_on_the_path_and_only_where_it_is_not_the_systems() -> None:
    assert plan().environment["PATH"].endswith("/bin:/opt/ash/python/bin")
    system = plan(runtime=SYSTEM_RUNTIME)
    assert "/opt/ash/python" not in system.environment["PATH"]
    assert system.python == system.command[0] == "/usr/bin/python3"


def test_the_first_process_limits_processes_where_no_control_group_does() -> None:
    assert plan().processes == 0
    assert plan(enforcement=BARE).processes == 512


def test_an_unsafe_plan_says_that_it_is() -> None:
    plans = UnsafePlans(BARE, Path("/run/ash/x"))
    made = plans.plan(SPEC, HOME_RUNTIME, limits_of(SPEC, SETTINGS))
    assert plans.warnings[0].startswith("unsafe:")
    assert made.python == made.command[0] == HOME_RUNTIME.host_python and made.mounts == ()
    assert made.own_directories[0] == "/run/ash/x/w/sbx-x" and made.directory.startswith(made.own_directories[0])


def test_the_runtime_of_this_process_has_the_runner() -> None:
    runtime = find_runtime()
    assert runtime.arguments[-2:] == ("-m", "ash_recipes.runner")
    assert all(Path(path).is_dir() for path in (*runtime.binds.values(), *runtime.host_python_path))
    assert any((Path(path) / "ash_recipes").is_dir() for path in runtime.host_python_path)
    assert all(inside.startswith("/opt/ash/") for inside in runtime.binds)
    assert all(path.startswith(("/opt/ash/", "/usr/")) for path in (*runtime.python_path, runtime.python))


def test_the_runner_is_compiled_once_and_without_a_path_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("value = 1\n")
    compile_runner(replace(HOME_RUNTIME, binds={"/opt/ash/lib/package": str(tmp_path), "/opt/ash/site": "/nowhere"}))
    (compiled,) = (tmp_path / "__pycache__").iterdir()
    assert b"/opt/ash/lib/package/module.py" in compiled.read_bytes()
    assert str(tmp_path).encode() not in compiled.read_bytes()
