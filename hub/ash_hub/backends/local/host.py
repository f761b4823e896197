"""The host's support for isolation: the checks of `ash doctor`, and the facts that launch plans are made from."""

from __future__ import annotations

import grp
import os
import pwd
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ash_hub.backends.checks import Check
from ash_hub.backends.local import seccomp
from ash_hub.backends.local.keeper import cgroups
from ash_hub.backends.local.keeper.launchers import mount_names
from ash_hub.backends.local.keeper.launchers.bubblewrap_trial import find_bubblewrap, try_bubblewrap, version_of
from ash_hub.backends.local.keeper.user_ranges import lock_problem
from ash_hub.backends.local.limits import namespaced_processes
from ash_hub.backends.local.ordinary_host import find_ordinary, ordinary_checks
from ash_hub.backends.local.plans import ETC_FROM_HOST, HostFacts
from ash_hub.backends.local.refusals import namespace_fix
from ash_hub.backends.local.refusals import sysctl as _sysctl
from ash_hub.backends.local.runtime import find_runtime, without_system
from ash_hub.backends.local.settings import USERS_EACH, LocalSettings
from ash_hub.backends.local.subordinates import subordinate_lines
from ash_mcp.errors import ConfigError

__all__ = [
    "host_facts",
    "isolation_works",
    "machine_problem",
    "may_raise_limits",
    "namespaced_processes",
    "probe",
    "snapshot_problem",
    "user_block_problem",
]

_TRIAL_SECONDS = 10.0
_TOP_LEVEL = ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin")
_TELLING = (
    *("kcore", "keys", "key-users", "kmsg", "kpagecgroup", "kpagecount", "kpageflags", "latency_stats", "cmdline"),
    *("sched_debug", "slabinfo", "timer_list", "vmallocinfo", "modules", "partitions", "diskstats", "locks"),
)
_OVERLAYS = "let Python mount overlays, as Linux 5.11 does"
_QUOTAS_OF_MACHINES = (
    "each sandbox has users of its own; pseudoterminals are the whole host's, and sandboxes that are forked from one "
    "process share its inotify instances (fs.inotify.max_user_instances), 32 each at most"
)
_QUOTAS = (
    "shared by the hive's user with all sandboxes: inotify instances, epoll watches, pipe pages, descriptors in "
    "flight; and by the whole host, pseudoterminals"
)
_QUOTAS_OF_ORDINARY = (
    "each sandbox has users of its own; pseudoterminals are the whole host's, and inotify instances (16 for each), "
    "watches (8192) and processes count for the hive's user as well"
)


def probe(settings: LocalSettings | None = None) -> list[Check]:
    """Return the checks of this host for `ash doctor`; one starts a trial sandbox.

    Args:
        settings: Of a hive; None: nothing is looked at that depends on them.
    """
    facts = host_facts()
    checks = [_linux(), _bubblewrap(facts)]
    if facts.bubblewrap:
        machines, has_users = _machines(facts, settings) if settings is not None else ([], False)
        checks += [_namespaces(facts), *machines, *_options(facts, machine=has_users)]
    checks += [_seccomp(facts), _cores(), *_groups(), _python(), _redis()]
    return checks


def host_facts() -> HostFacts:
    """Return the facts about this host that launch plans depend on; some are found by trying."""
    program, options = find_bubblewrap()
    links = {path: os.readlink(path) for path in _TOP_LEVEL if os.path.islink(path)}
    directories = ["/usr", *(path for path in _TOP_LEVEL if os.path.isdir(path) and path not in links)]
    shown = next(iter(find_runtime().binds.values()), "/usr")
    mounts = _mounts([*directories, "/etc", shown])
    return HostFacts(
        bubblewrap=program,
        options=options,
        links=links,
        directories=tuple(directories),
        masked=tuple(f"/proc/{name}" for name in _TELLING if os.path.exists(f"/proc/{name}")),
        seccomp=seccomp.for_machine(os.uname().machine),
        etc={path: os.path.realpath(path) for path in ETC_FROM_HOST if os.path.exists(path)},
        overlays=shown in mounts,
        own_inodes={*directories, "/etc", shown} <= mounts,
        seals="seal" in mounts,
        core_program=_core_program(),
    )


def _mounts(directories: Sequence[str]) -> frozenset[str]:
    """Return those of `directories` that overlays can show, and `seal` if device nodes can be sealed, by trying it."""
    words = [sys.executable, "-I", "-S", mount_names.__file__, *directories]
    try:
        shown = subprocess.run(words, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(shown.splitlines())


def machine_problem(facts: HostFacts, base: Path | None, first_user: int, shown: Sequence[str] = ()) -> str | None:
    """Return why this host can give no sandbox users and a writable root of its own, by trying it; None if it can.

    Args:
        base: What roots begin as; None: it is not tried.
        shown: Directories of the host that sandboxes may write to, too, beside `/usr`.
        first_user: The first of the users that sandboxes are given.
    """
    if os.geteuid() != 0:
        return "the hive runs as an ordinary user, whose sandboxes have one user each"
    if tuple(facts.directories) != ("/usr",):
        return "this host's programs are not all in /usr"
    if any(mount_names.hides_mounts(path) for path in ("/usr", *shown)):
        return "something is mounted below /usr or what belongs to it, which a writable overlay would not show"
    if (problem := lock_problem()) is not None:
        return problem
    try:
        without_system(find_runtime())
    except (ConfigError, OSError) as error:
        return str(error)
    why = _tried(first_user, ["/usr", *shown, *([] if base is None else [str(base)])])
    return f"the kernel refuses idmapped mounts below a writable overlay: {why}" if why is not None else None


def snapshot_problem(first_user: int) -> str | None:
    """Return why what machines write cannot be frozen on this host, by trying it; None if it can."""
    why = _tried(first_user, ["/usr"], "layered=True")
    return f"the kernel has no idmapped tmpfs that is mounted nowhere (Linux 6.15): {why}" if why is not None else None


def _tried(first_user: int, directories: Sequence[str], more: str = "") -> str | None:
    """Return why a trial of the stage in a process of its own failed."""
    program = _TRIAL.format(more=more)
    words = [sys.executable, "-I", "-S", "-c", program, str(Path(__file__).parent), str(first_user), *directories]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if said.returncode == 0 and said.stdout.strip() == "ok":
        return None
    return "".join((said.stdout or said.stderr).strip().splitlines()[-1:])


_TRIAL = (
    "import sys; sys.path.append(sys.argv[1]); from keeper.launchers.staging import try_out; "
    "print(try_out(sys.argv[3:], int(sys.argv[2]), 65536, {more}))"
)


def user_block_problem(first: int, count: int, machines: int = 1) -> str | None:
    """Return what is wrong with a block of the host's users for sandboxes, and what to do; None if it can be used.

    Args:
        machines: How many sandboxes there may be.
    """
    settings = "ASH_HUB_BACKEND__FIRST_USER and ASH_HUB_BACKEND__USERS"
    last, needed = first + count - 1, machines * USERS_EACH
    if count < needed:
        return (
            f"{machines} sandboxes need {needed} users, 65536 each, and there are {count}: raise "
            "ASH_HUB_BACKEND__USERS or lower ASH_HUB_BACKEND__MAX_SANDBOXES"
        )
    if last > 0x7FFF_FFFE:
        return f"the users {first} to {last} go beyond 2147483646: choose others with {settings}"
    for path in ("/etc/subuid", "/etc/subgid"):
        for name, begin, length in subordinate_lines(path):
            if begin <= last and first < begin + length:
                return (
                    f"the users {first} to {last} overlap those that {path} gives to {name} ({begin} to "
                    f"{begin + length - 1}): choose others with {settings}"
                )
    known = [(user.pw_uid, user.pw_name) for user in pwd.getpwall()]
    known += [(group.gr_gid, group.gr_name) for group in grp.getgrall()]
    taken = next((f"{name} ({number})" for number, name in known if first <= number <= last), None)
    if taken is not None:
        return f"the users {first} to {last} include {taken} of this host: choose others with {settings}"
    return None


def may_raise_limits() -> bool:
    """Return whether this user may raise a hard limit, by trying it in a process of its own."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
    code += "resource.setrlimit(resource.RLIMIT_CORE, (1, 1))"
    words = [sys.executable, "-I", "-S", "-c", code]
    try:
        return subprocess.run(words, capture_output=True, timeout=_TRIAL_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _core_program() -> bool:
    """Say whether the host's program for cores is started for sandboxes: with a limit of 0 bytes it is, with 1 not."""
    if not _sysctl("kernel/core_pattern").startswith("|"):
        return False
    return resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 and not may_raise_limits()


def isolation_works(facts: HostFacts) -> str | None:
    """Start and end an isolated process; return why that failed, or None."""
    return try_bubblewrap(
        facts.bubblewrap,
        facts.options,
        directories=facts.directories,
        links=facts.links,
        system_call_filter=facts.seccomp,
    )


def _linux() -> Check:
    system = os.uname()
    detail = f"{system.sysname} {system.release} on {system.machine}"
    return Check("linux", sys.platform == "linux", detail, "run the hive on Linux", required=True)


def _bubblewrap(facts: HostFacts) -> Check:
    if not facts.bubblewrap:
        fix = "install it: `sudo apt-get install bubblewrap` (or dnf, pacman, apk)"
        return Check("bubblewrap", False, "not installed", fix, required=True)
    return Check("bubblewrap", True, f"{version_of(facts.bubblewrap)} at {facts.bubblewrap}", required=True)


def _namespaces(facts: HostFacts) -> Check:
    failure = isolation_works(facts)
    if failure is None:
        who = "root" if os.geteuid() == 0 else "an ordinary user"
        return Check("namespaces", True, f"a trial sandbox ran, as {who}", required=True)
    return Check(
        "namespaces",
        False,
        f"a trial sandbox failed: {failure}",
        namespace_fix(facts.bubblewrap, _sysctl),
        required=True,
    )


def _machines(facts: HostFacts, settings: LocalSettings) -> tuple[list[Check], bool]:
    """Return what is to be said of machines, and whether each sandbox has users of its own."""
    if settings.unsafe or not settings.machine:
        return [Check("ordinary machine", True, "not wanted: sandboxes have a read-only system")], False
    if os.geteuid() != 0:
        found = find_ordinary(facts, settings.max_sandboxes)
        return ordinary_checks(found, facts, settings), not isinstance(found, str) and found.lacks is None
    lost = "sandboxes have a read-only system, and nobody is root in them"
    if (problem := machine_problem(facts, None, settings.first_user)) is not None:
        fix = "run the hive on Linux 5.19 or later, with /usr on ext4, xfs or btrfs and nothing mounted below it"
        return [Check("ordinary machine", False, f"{lost}: {problem}", fix)], False
    taken = user_block_problem(settings.first_user, settings.users, settings.max_sandboxes)
    if taken is not None:
        return [
            Check("ordinary machine", False, lost, "see the next"),
            Check("users of sandboxes", False, taken),
        ], False
    users = f"from {settings.first_user} on, {settings.users} in all, for {settings.users // USERS_EACH} sandboxes"
    detail = "each sandbox is root inside, with 65536 users and a writable root of its own"
    checks = [Check("ordinary machine", True, detail), Check("users of sandboxes", True, users)]
    checks.append(_snapshots(settings.first_user))
    return checks, True


def _snapshots(first_user: int) -> Check:
    problem = snapshot_problem(first_user)
    if problem is not None:
        return Check("snapshots", False, f"sandboxes cannot be frozen: {problem}", "use Linux 6.15 or later")
    return Check("snapshots", True, "files of sandboxes can be frozen and gone back to; they are kept in memory")


def _options(facts: HostFacts, *, machine: bool) -> list[Check]:
    nested, size = "--disable-userns" in facts.options, "--size" in facts.options
    update = "use bubblewrap 0.8 or later"
    hidden = "tells nothing" if facts.overlays else "tells where on this host the hive's Python and recipes lie"
    kept = "keep their modes, owners and times" if facts.seals else "can be changed from inside a sandbox"
    shared = "can be locked and watched from inside one"
    return [
        Check(
            "files of the system",
            facts.own_inodes,
            "each sandbox has inodes of its own for them" if facts.own_inodes else f"the host's own /usr {shared}",
            f"{_OVERLAYS}, and mount nothing below /usr",
        ),
        Check(
            "device nodes",
            facts.seals,
            f"the host's own {kept}; they {shared}",
            "let Python make user namespaces and mounts",
        ),
        Check("kernel quotas", True, _QUOTAS_OF_MACHINES if os.geteuid() == 0 else _QUOTAS_OF_ORDINARY)
        if machine
        else Check("kernel quotas", False, _QUOTAS, "give the hive a user that has nothing else to do"),
        Check(
            "mount table",
            facts.overlays,
            f"inside a sandbox it {hidden}",
            f"{_OVERLAYS}, or install Ash outside of homes",
        ),
        Check(
            "nested namespaces",
            nested or facts.seccomp is not None,
            "refused by the kernel" if nested else "refused by the system call filter only",
            None if nested else update,
        ),
        Check("disk limits", size, "by the size of each tmpfs" if size else "bubblewrap cannot set sizes", update),
    ]


def _seccomp(facts: HostFacts) -> Check:
    machine = os.uname().machine
    there = facts.seccomp is not None
    fix = "run the hive on x86_64 or aarch64; namespaces alone hold sandboxes here"
    return Check("system call filter", there, f"{'built' if there else 'none'} for {machine}", None if there else fix)


def _cores() -> Check:
    if _sysctl("kernel/core_pattern").startswith("@"):
        detail = "of a sandbox's processes go to the host's socket for them"
        return Check("core dumps", False, detail, "give kernel.core_pattern a file or a program")
    if _core_program():
        detail = "of a sandbox's processes go to the host's program for them: this user's hard limit on cores is 0"
        return Check("core dumps", False, detail, "give this user a higher one: `hard core 1` in limits.conf")
    return Check("core dumps", True, "of no sandbox are taken")


def _groups() -> list[Check]:
    version, usable = cgroups.usable()
    found: list[Check] = []
    fix = "start the hive with `systemd-run --user --scope -p Delegate=yes ash up`"
    for controller, what in (("memory", "memory"), ("pids", "processes"), ("cpu", "processor time")):
        if controller in usable:
            found.append(Check(f"{what} limits", True, f"by control groups, version {version}"))
            continue
        fallback = {"memory": "for each process only", "pids": "none", "cpu": "none"}[controller]
        if controller == "pids" and namespaced_processes():
            fallback = "by RLIMIT_NPROC of a user namespace"
        found.append(Check(f"{what} limits", fallback.startswith("by "), f"{fallback}: no {controller} group", fix))
    counted = "memory" in usable
    found.append(Check("file count limits", counted, "by memory, which they take" if counted else "none", fix))
    return found


def _python() -> Check:
    version = ".".join(str(number) for number in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), f"{version} at {sys.base_prefix}", "install Python 3.11")


def _redis() -> Check:
    program = shutil.which("redis-server")
    detail = f"at {program}" if program else "not installed; only several replicas of a hive need it"
    return Check("redis-server", True, detail)
