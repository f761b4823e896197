"""Attempts of root inside, where a sandbox is a machine of its own: on who speaks for it, and on users of the host."""

from __future__ import annotations

from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["MACHINE"]

_BOUND = "machine"
"""The first of the host's users that sandboxes are given."""

MACHINE = (
    Attempt(
        name="machine: users of the host",
        tries="is one of the host's own users, by the map of its user namespace",
        script="""
runs = [[int(word) for word in line.split()] for line in text("/proc/self/uid_map").splitlines()]
told = ", ".join(f"{count} users from {outside} on" for _, outside, count in runs)
escaped(told) if min(outside for _, outside, _ in runs) < bound else stopped(told)""",
        stopped_by=("users of its own",),
        bound=_BOUND,
    ),
    Attempt(
        name="machine: users beyond its own",
        tries="becomes a user that is not one of its own",
        script="os.setuid(65536 + 1); escaped('user 65537')",
        stopped_by=("a range of users",),
        bound=_BOUND,
    ),
    Attempt(
        name="machine: another runner",
        tries="moves the folders that the runner's Python and the recipe are in, to put others there",
        script="""
for path in ("/opt/ash", "/opt"):
    try: os.rename(path, path + "-moved")
    except OSError as error: why = f"{reason(error)}: {path}"
    else: escaped(path)
stopped(why)""",
        stopped_by=("pinned folders", "folders of the base"),
        bound=_BOUND,
    ),
    Attempt(
        name="machine: another loader",
        tries="changes the loader, the libraries and the Python that the runner is made of",
        script="""
places = [line.split()[-1] for line in text("/proc/1/maps").splitlines()] or glob.glob("/opt/ash/usr/lib*/*/ld-*")
places += ["/opt/ash/usr/bin/env", *glob.glob("/opt/ash/python/bin/python3*"), "/opt/ash/init.py"]
found = [path for path in places if path.startswith("/opt/ash/") and os.path.isfile(path)]
absent("nothing of it is to be seen") if not found else None
for path in found:
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError as error: why = reason(error)
    else: escaped(path)
stopped(f"{why}, {len(found)} files")""",
        stopped_by=("a read-only runner",),
        bound=_BOUND,
    ),
)
