"""Launch plans: pure, so looked at without starting anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ash_hub.backends.local.launchers.base import HostFacts, Plan
from ash_hub.backends.local.launchers.bubblewrap import BubblewrapLauncher
from ash_hub.backends.local.launchers.unsafe import UnsafeLauncher
from ash_hub.backends.local.limits import Enforcement, limits_of
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
    return BubblewrapLauncher(host, enforcement, Path("/run/ash/x")).plan(SPEC, runtime, limits_of(SPEC, SETTINGS))


def pairs(plan: Plan, option: str, width: int = 2) -> list[tuple[str, ...]]:
    return [plan.args[i + 1 : i + 1 + width] for i, word in enumerate(plan.args) if word == option]


def variables(plan: Plan) -> dict[str, str]:
    return {pair[0]: pair[1] for pair in pairs(plan, "--setenv")}


def test_the_command_line_has_nothing_of_the_host_or_the_recipe() -> None:
    words = " ".join(plan().argv)
    assert "somebody" not in words and "general" not in words and "sbx" not in words
    assert plan().argv[1:4] == ("--args", "@fd:args@", "--")
    assert dict(plan().env) == {}


def test_every_namespace_is_new_and_no_privilege_stays() -> None:
    options = set(plan().args)
    assert options >= {"--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"}
    assert "--share-net" not in options and "--as-pid-1" in options
    assert pairs(plan(), "--cap-drop", 1) == [("ALL",)]
    assert pairs(plan(), "--seccomp", 1) == [("@fd:seccomp@",)] and plan().files["seccomp"] == b"filter"


def test_nothing_of_the_host_is_bound_writable() -> None:
    assert not {"--bind", "--bind-try", "--dev-bind", "--dev-bind-try"} & set(plan().args)
    sources = [source for source, _ in pairs(plan(), "--ro-bind")]
    assert sources == ["/usr", "/lib64", "/dev/null", "/home/somebody", "/home/somebody/site", "/home/somebody/recipe"]


def test_bound_directories_come_under_names_of_the_keeper_where_the_host_lets_it() -> None:
    veiled = plan(replace(HOST, veils=True))
    assert plan().veils == ()
    assert veiled.veils == (
        ("/run/ash/x/v/0", "/home/somebody"),
        ("/run/ash/x/v/1", "/home/somebody/recipe"),
        ("/run/ash/x/v/2", "/home/somebody/site"),
    )
    assert not any("somebody" in word for word in veiled.args)
    assert ("/run/ash/x/v/1", "/opt/recipe") in pairs(veiled, "--ro-bind")


def test_the_root_is_made_read_only_after_everything_is_in_it() -> None:
    args = plan().args
    last_mount = max(index for index, word in enumerate(args) if word in ("--tmpfs", "--ro-bind", "--file"))
    assert all(args.index("--remount-ro") > index for index in (last_mount,))
    assert pairs(plan(), "--remount-ro", 1) == [("/proc",), ("/dev",), ("/",)]


def test_every_writable_place_has_a_size() -> None:
    args = plan().args
    for index, word in enumerate(args):
        if word == "--tmpfs":
            assert args[index - 4] == "--size" and int(args[index - 3]) > 0
    assert {path for (path,) in pairs(plan(), "--tmpfs", 1)} == {"/tmp", "/dev/shm", "/home/ash", "/workspace"}


def test_an_old_bubblewrap_gets_no_option_that_it_does_not_know_and_a_warning() -> None:
    old = replace(HOST, options=frozenset[str]())
    assert not {"--size", "--disable-userns"} & set(plan(old).args)
    assert any("disk space" in sentence for sentence in BubblewrapLauncher(old, FULL, Path("/r")).warnings)
    assert list(BubblewrapLauncher(HOST, FULL, Path("/r")).warnings) == []


def test_a_machine_without_a_filter_is_warned_of() -> None:
    unfiltered = replace(HOST, seccomp=None)
    assert "--seccomp" not in plan(unfiltered).args
    assert any("not filtered" in sentence for sentence in BubblewrapLauncher(unfiltered, FULL, Path("/r")).warnings)


def test_the_runner_is_told_what_its_contract_says_and_a_recipe_cannot_forge_a_descriptor() -> None:
    told = variables(plan())
    assert told["ASH_LISTEN_FD"] == "@fd:listen@"
    assert json.loads(told["ASH_RUNNER_CONFIG"]) == {
        "sandbox_id": "sbx-x",
        "generation": 1,
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
    assert variables(plan())["PATH"].endswith("/bin:/opt/ash/python/bin")
    system = plan(runtime=SYSTEM_RUNTIME)
    assert "/opt/ash/python" not in variables(system)["PATH"]
    assert system.argv[4] == "/usr/bin/python3"


def test_the_first_process_limits_processes_where_no_control_group_does() -> None:
    assert plan().argv[9:11] == ("0", "ns")
    assert plan(enforcement=BARE).argv[9:11] == ("512", "ns")


def test_an_unsafe_plan_says_that_it_is() -> None:
    launcher = UnsafeLauncher(BARE, Path("/run/ash/x"))
    made = launcher.plan(SPEC, HOME_RUNTIME, limits_of(SPEC, SETTINGS))
    assert launcher.warnings[0].startswith("unsafe:")
    assert made.argv[0] == HOME_RUNTIME.host_python and "tree" in made.argv
    assert made.directories[0] == "/run/ash/x/w/sbx-x" and made.cwd.startswith(made.directories[0])


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
