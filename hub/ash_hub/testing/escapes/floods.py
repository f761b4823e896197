"""Attempts to use more than was given. What the backend does not bound on a host is absent from its bounds."""

from __future__ import annotations

from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["FLOODS"]


def _flood(
    name: str, tries: str, bound: str, script: str, *, stopped_by: str, fatal: bool = False, watched: bool = False
) -> Attempt:
    return Attempt(
        name=f"flood: {name}",
        tries=tries,
        script=script,
        stopped_by=(stopped_by,),
        bound=bound,
        fatal=fatal,
        watched=watched,
    )


FLOODS = (
    _flood(
        "processes",
        "forks without end",
        "processes",
        """
made = []
try:
    while len(made) <= bound:
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
        made.append(pid)
except BlockingIOError as error: why = reason(error)
for pid in made:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
escaped(f"{len(made)} processes") if len(made) > bound else stopped(f"{why} at {len(made)}")""",
        stopped_by="process limit",
    ),
    _flood(
        "threads",
        "starts threads without end",
        "processes",
        """
threading.stack_size(65536)
end, made = threading.Event(), 0
try:
    while made <= bound:
        threading.Thread(target=end.wait, args=(20,), daemon=True).start()
        made += 1
except RuntimeError as error: why = error
escaped(f"{made} threads") if made > bound else stopped(f"{why} at {made}")""",
        stopped_by="process limit",
    ),
    _flood(
        "open files",
        "opens files without end",
        "open_files",
        """
made = []
try:
    while len(made) <= bound: made.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error: stopped(f"{reason(error)} at {len(made)}")
escaped(f"{len(made)} files")""",
        stopped_by="open files limit",
    ),
    _flood(
        "disk",
        "fills every place that it can write to",
        "places",
        """
block, over = bytes(1 << 20), []
for place, most in bound.items():
    path, written = place + "/flood", 0
    try:
        with open(path, "wb", buffering=0) as file:
            while written <= most: written += file.write(block)
        over.append(place)
    except OSError as error: why = f"{reason(error)} after {written} bytes in {place}"
    os.unlink(path)
escaped(str(over)) if over else stopped(why)""",
        stopped_by="sizes of places",
    ),
    _flood(
        "processor",
        "computes with more processes than it has processors' worth of time",
        "cpu",
        """
def used():
    times = os.times()
    return times.children_user + times.children_system
begin, children = time.monotonic(), []
for _ in range(max(2, int(bound * 2))):
    pid = os.fork()
    if pid == 0:
        while time.monotonic() < begin + 1.5: pass
        os._exit(0)
    children.append(pid)
for pid in children: os.waitpid(pid, 0)
share = used() / (time.monotonic() - begin)
told = f"{share:.2f} processors of {bound}"
absent("this host has no more") if os.cpu_count() < 2 * bound else None
escaped(told) if share > 1.4 * bound else stopped(told)""",
        stopped_by="processor limit",
    ),
    _flood(
        "output",
        "writes without end to its server's output, which the hive keeps as a log",
        "hive_bytes",
        """
own = {os.fstat(number).st_ino for number in (1, 2)}
found = {}
for path in glob.glob("/proc/[0-9]*/fd/[12]"):
    try: status = os.stat(path)
    except OSError: continue
    if stat.S_ISFIFO(status.st_mode) and status.st_ino not in own: found[status.st_ino] = path
absent("its server's output is no pipe, or out of its reach") if not found else None
pipes = [os.open(path, os.O_WRONLY | os.O_NONBLOCK) for path in found.values()]
block, written, end = b"x" * 65535 + b"\\n", 0, time.monotonic() + 20
while written < 4 * bound and time.monotonic() < end:
    for pipe in pipes:
        try: written += os.write(pipe, block)
        except BlockingIOError: time.sleep(0.001)
stopped(f"the hive did not keep all of {written} bytes, and its neighbour was answered")""",
        stopped_by="bounded log",
        watched=True,
    ),
    _flood(
        "memory",
        "takes memory without end",
        "memory_bytes",
        """
taken = []
while len(taken) << 22 <= bound * 1.25: taken.append(b"x" * (1 << 22))
escaped(f"{len(taken) * 4} MiB")""",
        stopped_by="memory limit",
        fatal=True,
    ),
    _flood(
        "inodes",
        "makes empty files without end",
        "inodes",
        """
held = bytearray(b"x") * (24 << 20)  # so that the kernel, short of memory, ends this process
os.mkdir("/tmp/flood")
os.chdir("/tmp/flood")
for number in range(bound): os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY))
escaped(f"{bound} files")""",
        stopped_by="memory limit",
        fatal=True,
    ),
)
