"""Attempts on what sandboxes share with the host and each other, unless a backend gives each of its own.

Files of the system that are the host's own inodes tell who opens them, and carry locks from one sandbox to another.
What the kernel gives to each user of the host, one sandbox can take from all. A backend that bounds either says so.
"""

from __future__ import annotations

from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["SHARED"]

_LOCKED = """
import fcntl
def held(path):
    descriptor = os.open(path, os.O_RDONLY)
    try: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: return True
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    return struct.unpack_from("h", fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK
"""

_INODES = (
    Attempt(
        name="watch the neighbour",
        tries="watches /usr/bin for what another sandbox runs",
        script="""
import select
watch = libc.inotify_init1(os.O_CLOEXEC)
stopped("it has no watch") if libc.inotify_add_watch(watch, b"/usr/bin", 0x20) < 0 else None
if not select.select([watch], [], [], 1.5)[0]: stopped("nothing was opened for 1.5 seconds")
escaped(f"{os.read(watch, 4096)[16:].rstrip(bytes(1)).decode()} was run")""",
        stopped_by=("inodes of its own",),
        bound="own_files",
        watched=True,
    ),
    Attempt(
        name="locks on files",
        tries="finds out about a lock that the host holds on a file of the system",
        script=_LOCKED
        + """
paths = [path for path in bait["locked"] if os.path.exists(path)]
found = [path for path in paths if held(path)]
escaped(str(found)) if found else stopped(f"it has the locks of {paths} to itself")""",
        stopped_by=("inodes of its own",),
        bound="own_files",
    ),
    Attempt(
        name="locks on devices",
        tries="finds out about a lock that the host holds on a device node",
        script=_LOCKED
        + """
path = bait["locked_device"]
absent("the host has no such node") if not path else None
escaped(path) if held(path) else stopped(f"it has the lock of {path} to itself")""",
        stopped_by=("devices of its own",),
        bound="own_devices",
    ),
)


def _quota(name: str, tries: str, bound: str, script: str) -> Attempt:
    return Attempt(name=f"quota: {name}", tries=tries, script=script, stopped_by=("quotas of its own",), bound=bound)


_QUOTAS = (
    _quota(
        "inotify instances",
        "takes the inotify instances of its user on the host",
        "inotify_instances",
        """
for made in range(bound + 1):
    if libc.inotify_init1(0) < 0: stopped(f"{errno.errorcode[ctypes.get_errno()]} at {made}")
escaped(f"{bound + 1} instances")""",
    ),
    _quota(
        "epoll watches",
        "takes the epoll watches of its user on the host",
        "epoll_watches",
        """
import select
reading, _ = os.pipe()
copies, polls, made = [os.dup(reading) for _ in range(200)], [], 0
while made <= bound:
    polls.append(select.epoll())
    for copy in copies:
        polls[-1].register(copy)
        made += 1
escaped(f"{made} watches")""",
    ),
    _quota(
        "terminals",
        "takes the pseudoterminals of the host",
        "terminals",
        """
for _ in range(bound + 1): os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
escaped(f"{bound + 1} terminals")""",
    ),
    _quota(
        "pipe pages",
        "takes the pages that its user on the host may have in pipes",
        "pipe_pages",
        """
import fcntl
taken = 0
while taken <= bound:
    _, writing = os.pipe()
    taken += fcntl.fcntl(writing, 1031, 1 << 20) // os.sysconf("SC_PAGE_SIZE")
escaped(f"{taken} pages")""",
    ),
    _quota(
        "descriptors in flight",
        "takes the descriptors that its user on the host may have on their way",
        "descriptors_in_flight",
        """
import array
sending, receiving = socket.socketpair()
for sent in range(0, bound + 1, 200):
    sending.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))])
escaped(f"{sent + 200} descriptors")""",
    ),
)

SHARED = (*_INODES, *_QUOTAS)
