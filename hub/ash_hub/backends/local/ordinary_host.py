"""Probes this host for machines of an ordinary user: subordinate users, namespaces, a writable root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ash_hub.backends.checks import Check
from ash_hub.backends.local.keeper.launchers.plan import Subordinate
from ash_hub.backends.local.keeper.user_ranges import lock_problem
from ash_hub.backends.local.machine_base import base_entries
from ash_hub.backends.local.ordinary import OrdinaryMachine, files_for, name_of_copy, with_ranges
from ash_hub.backends.local.plans import HostFacts
from ash_hub.backends.local.refusals import namespace_fix
from ash_hub.backends.local.runtime import find_runtime, without_system
from ash_hub.backends.local.settings import LocalSettings
from ash_hub.backends.local.subordinates import own_subordinates, user_lock
from ash_mcp.errors import ConfigError

__all__ = ["find_ordinary", "ordinary_checks", "system_directory", "tried"]

_TRIAL_SECONDS = 20.0
_TRIAL = """\
import sys
sys.path.append(sys.argv[1])
from keeper.launchers.plan import Subordinate
from keeper.launchers.subordinate import try_out
numbers = [int(word) for word in sys.argv[2:]]
print(try_out(Subordinate(*numbers[:3], owner=numbers[3])))
"""


def find_ordinary(facts: HostFacts, sandboxes: int) -> OrdinaryMachine | str:
    """Return what the machines of this user's hive are made of, or why there can be none, and what to do.

    Args:
        sandboxes: How many there may be at a time.
    """
    if tuple(facts.directories) != ("/usr",):
        return "this host's programs are not all in /usr"
    try:
        without_system(find_runtime())
    except (ConfigError, OSError) as error:
        return str(error)
    alone = Subordinate()
    if (problem := tried(alone)) is not None:
        return problem
    machine = _with_ranges(sandboxes)
    if isinstance(machine, str):
        return OrdinaryMachine(users=alone, lacks=machine, files=files_for(alone.runs))
    return machine


def _with_ranges(sandboxes: int) -> OrdinaryMachine | str:
    users = own_subordinates()
    if isinstance(users, str):
        return users
    try:
        lock = user_lock()
    except OSError as error:
        return f"the users of sandboxes cannot be locked: {error}"
    if (problem := lock_problem(str(lock))) is not None:
        return problem
    return tried(users) or with_ranges(users, lock, sandboxes)


def tried(users: Subordinate) -> str | None:
    """Return why no root can be made for these users and what to do, or None."""
    numbers = (users.first_user, users.first_group, users.size, users.owner)
    words = [sys.executable, "-I", "-S", "-c", _TRIAL, str(Path(__file__).parent), *(str(each) for each in numbers)]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    answer = (said.stdout or said.stderr).strip().splitlines()[-1:]
    step, _, why = "".join(answer).partition(": ")
    match step:
        case "ok":
            return None
        case "overlay":
            return f"the kernel refuses an overlay that this user can write to ({why}): use Linux 5.11 or later"
        case "namespaces":
            fix = namespace_fix(os.path.realpath(sys.executable))
            return f"this user may make no namespaces of its own ({why}): {fix}"
        case _:
            return why or step


def system_directory(settings: LocalSettings, environ: Mapping[str, str] | None = None) -> Path:
    """Return where copies of the host's system are."""
    if settings.system_dir is not None:
        return settings.system_dir
    env = os.environ if environ is None else environ
    return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ash/systems"


def ordinary_checks(found: OrdinaryMachine | str, facts: HostFacts, settings: LocalSettings) -> list[Check]:
    """Return what `ash doctor` says of the machines of an ordinary user."""
    name = "ordinary machine"
    if isinstance(found, str):
        lost = "sandboxes have a read-only system, and nobody is root in them"
        return [Check(name, False, f"{lost}: {found}", "see docs/machine.md; a hive that root runs may have machines")]
    place = system_directory(settings)
    copy = name_of_copy(base_entries(facts.links), found.users, settings.system_without)
    there = "which is there" if (place / copy).is_dir() else "which the next hive makes"
    begins = f"its root begins as a copy of this host's system in {place}, {there}"
    if found.lacks is not None:
        detail = f"each sandbox is root inside, as the hive's own user, and no other user is; {begins}"
        return [Check(name, True, detail), Check("users of sandboxes", False, "none of their own", found.lacks)]
    first, count = found.block
    users = f"from {first} on, {count} in all (/etc/subuid): {found.each} for each of {count // found.each} sandboxes"
    is_enough = count // found.each >= settings.max_sandboxes
    fix = f"more than that are refused: lower ASH_HUB_BACKEND__MAX_SANDBOXES ({settings.max_sandboxes})"
    return [
        Check(name, True, f"each sandbox is root inside, with {found.each} users; {begins}"),
        Check("users of sandboxes", is_enough, users, None if is_enough else fix),
    ]
