"""Attempts on the host's files, processes, sockets and names, and on other sandboxes."""

from __future__ import annotations

from ash_hub.testing.escapes.attempt import Attempt

__all__ = ["SURROUNDINGS"]

_FILES = (
    Attempt(
        name="host file",
        tries="reads a file in the host's /tmp that everybody may read",
        script="with open(bait['file']) as file: escaped(file.read())",
        stopped_by=("own /tmp",),
    ),
    Attempt(
        name="host homes",
        tries="looks for keys in the homes of the host's users",
        script="""
found = [path for home in ("/root", *glob.glob("/home/*")) for path in glob.glob(home + "/.ssh/*")]
escaped(str(found)) if found else stopped("no home but its own is there: " + str(os.listdir("/home")))""",
        stopped_by=("own homes",),
    ),
    Attempt(
        name="host users",
        tries="reads who the host's users are, and its machine id",
        script="""
names = [line.split(":")[0] for line in text("/etc/passwd").splitlines()]
more = [path for path in ("/etc/machine-id", "/etc/ssh") if os.path.exists(path)]
more += [path for path in ("/etc/shadow", "/etc/fstab") if "$" in text(path) or "/dev/" in text(path)]
everywhere = "root ash nobody daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc _apt"
told = sorted(set(names) - set(everywhere.split()))
escaped(f"{told} {more}") if more or told else stopped(f"only {names}")""",
        stopped_by=("own /etc",),
    ),
    Attempt(
        name="host paths",
        tries="reads in an installed package's files where it comes from",
        script="""
found = [p for pattern in ("*.pth", "*.egg-link", "*.dist-info/direct_url.json")
         for p in glob.glob("/opt/ash/site*/" + pattern)]
told = [path for path in found if text(path)]
absent("no such file is installed") if not found else None
escaped(str(told)) if told else stopped(f"{len(found)} such files are empty")""",
        stopped_by=("empty files of installations",),
    ),
    Attempt(
        name="mount table",
        tries="reads in its mount table where on the host its directories lie",
        script="""
absent("this host cannot hide them, or there is nothing to hide") if not bait["hidden_paths"] else None
table = (text("/proc/self/mountinfo") + text("/proc/1/mountinfo")).replace(chr(92) + "040", " ")
told = [path for path in bait["hidden_paths"] if path in table]
escaped(str(told)) if told else stopped("it tells of /proc/self/fd only")""",
        stopped_by=("hidden paths",),
    ),
    Attempt(
        name="write the system",
        tries="writes into the system's directories",
        script="""
for path in ("/usr", "/usr/local", "/usr/bin"):
    name = f"{path}/ash-escape-{os.getpid()}"
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        why = reason(error)
        if error.errno != errno.EROFS: continue
    else:
        os.unlink(name)
        escaped(path)
stopped(why)""",
        stopped_by=("read-only system",),
        bound="read_only_system",
    ),
    Attempt(
        name="write the runner",
        tries="writes into the folders of the hive's Python and its packages",
        script="""
places = [path for path in ("/opt/ash", *glob.glob("/opt/ash/*")) if os.path.isdir(path)]
for path in places:
    name = f"{path}/ash-escape-{os.getpid()}"
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except OSError as error:
        why = reason(error)
        if error.errno != errno.EROFS: continue
    else:
        os.unlink(name)
        escaped(path)
absent("it has none of its own") if not places else None
stopped(why)""",
        stopped_by=("read-only system",),
    ),
    Attempt(
        name="write the root",
        tries="puts files beside the directories of its root and into /etc",
        script="""
for path in ("/escape", "/etc/escape", "/opt/escape", "/run/escape"):
    try: os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    except OSError as error: why = reason(error)
    else: escaped(path)
stopped(why)""",
        stopped_by=("read-only root",),
        bound="read_only_system",
    ),
    Attempt(
        name="hide files in /dev",
        tries="stores files in /dev, which has no size",
        script="os.close(os.open('/dev/escape', os.O_CREAT | os.O_WRONLY)); escaped('/dev/escape')",
        stopped_by=("read-only /dev",),
    ),
    Attempt(
        name="write kernel settings",
        tries="opens files of /proc that are no process's for writing",
        script="""
for folder, folders, files in os.walk("/proc"):
    if folder == "/proc": folders[:] = [name for name in folders if not name.isdigit() and "self" not in name]
    for name in files:
        path = os.path.join(folder, name)
        try: descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error: why = reason(error)
        else:
            if not os.path.samefile(path, "/dev/null"): escaped(path)
            os.close(descriptor)
stopped(why)""",
        stopped_by=("read-only /proc",),
    ),
    Attempt(
        name="kernel's secrets",
        tries="reads files of /proc that tell about the host",
        script="""
names = ("cmdline", "kcore", "keys", "key-users", "kmsg", "modules", "partitions", "diskstats", "slabinfo",
         "timer_list", "vmallocinfo", "sched_debug", "kpagecount", "locks")
told = []
for name in names:
    try:
        descriptor = os.open("/proc/" + name, os.O_RDONLY | os.O_NONBLOCK)
        told += [name] if os.read(descriptor, 1) else []
    except OSError: pass
escaped(str(told)) if told else stopped("they are empty or not there")""",
        stopped_by=("masked files of /proc",),
    ),
    Attempt(
        name="devices by /sys",
        tries="looks at the host's devices and kernel in /sys",
        script="escaped(str(os.listdir('/sys')[:3]))",
        stopped_by=("no /sys",),
    ),
    Attempt(
        name="devices of the host",
        tries="opens disks and kernel devices in /dev",
        script="""
def opens(name):
    try: os.close(os.open("/dev/" + name, os.O_RDONLY | os.O_NONBLOCK))
    except OSError: return False
    return True
nodes = [name for name in os.listdir("/dev") if not os.path.isdir("/dev/" + name)]
disks = [name for name in nodes if stat.S_ISBLK(os.stat("/dev/" + name).st_mode)]
found = [name for name in {*disks, "mem", "kmsg", "port"} if name in nodes and opens(name)]
escaped(str(sorted(found)[:8])) if found else stopped(f"only {sorted(nodes)}")""",
        stopped_by=("own /dev",),
    ),
    Attempt(
        name="devices changed",
        tries="sets mode, owner, times and access list of device nodes, the host's own, to what they are",
        script="""
absent("none is the host's own") if bait["bounds"].get("own_devices") else None
paths = [path for path in (*glob.glob("/dev/*"), *glob.glob("/proc/[0-9]*/fd/*")) if os.path.exists(path)]
nodes = [path for path in paths if stat.S_ISCHR(os.stat(path).st_mode) and "/dev/pts" not in os.path.realpath(path)]
def changes(path):
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    entries = ((1, mode >> 6 & 7), (4, mode >> 3 & 7), (32, mode & 7))
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry, 0xFFFFFFFF) for entry in entries)
    yield "mode", lambda: os.chmod(path, mode)
    yield "owner", lambda: os.chown(path, -1, -1)
    yield "times", lambda: os.utime(path)
    yield "access list", lambda: os.setxattr(path, "system.posix_acl_access", access)
done = []
for path in nodes:
    for what, change in changes(path):
        try: change()
        except OSError as error: why = reason(error)
        else: done.append(f"{what} of {path}")
escaped(str(done)) if done else stopped(f"{why}, {len(nodes)} nodes")""",
        stopped_by=("sealed device nodes",),
    ),
    Attempt(
        name="device nodes",
        tries="makes a node for a disk",
        script="os.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); escaped('/tmp/disk')",
        stopped_by=("user namespace", "no capabilities"),
    ),
)

_PROCESSES = (
    Attempt(
        name="host processes",
        tries="reads command lines of the host's processes",
        script="""
found = [path for path in glob.glob("/proc/[0-9]*/cmdline")
         if bait["secret"] in text(path) and "ctypes" not in text(path)]
escaped(str(found)) if found else stopped(f"{len(glob.glob('/proc/[0-9]*'))} processes, all its own")""",
        stopped_by=("process namespace",),
    ),
    Attempt(
        name="signal the host",
        tries="may send a signal to a process of the hive's own user",
        script="os.kill(bait['pid'], 0); escaped(f'process {bait[\"pid\"]}')",
        stopped_by=("process namespace",),
    ),
    Attempt(
        name="host environment",
        tries="reads the environment of a process of the hive's own user",
        script="""
with open(f"/proc/{bait['pid']}/environ") as file: told = file.read()
escaped(told) if bait["secret"] in told else stopped("it is a process of its own")""",
        stopped_by=("process namespace", "user namespace", "no capabilities"),
    ),
    Attempt(
        name="launcher",
        tries="looks in its processes for how it was launched",
        script="""
lines = [text(path) for path in glob.glob("/proc/[0-9]*/cmdline")]
found = [line for line in lines if os.path.basename(line.split(chr(0))[0]) == "bwrap"]
escaped(str(found)) if found else stopped(f"{len(lines)} processes, none is the launcher")""",
        stopped_by=("own first process",),
    ),
    Attempt(
        name="first process",
        tries="reads the memory and environment of its first process",
        script="""
with open("/proc/1/environ") as file: told = file.read(1)
os.close(os.open("/proc/1/mem", os.O_RDONLY))
escaped("/proc/1/environ and /proc/1/mem")""",
        stopped_by=("closed first process",),
    ),
    Attempt(
        name="inherited environment",
        tries="looks for the hive's environment in its own processes",
        script="""
found = [path for path in glob.glob("/proc/[0-9]*/environ") if "HIVE_SECRET" in text(path)]
escaped(str(found)) if found else stopped(f"not among {len(os.environ)} variables")""",
        stopped_by=("clean environment",),
    ),
    Attempt(
        name="inherited files",
        tries="looks for descriptors that were left open in its processes",
        script="""
kinds = set()
for path in glob.glob("/proc/[0-9]*/fd/*"):
    try: target = os.readlink(path)
    except OSError: continue
    kinds.add(target.split(":")[0])
    if target.startswith("/memfd:") and "HIVE_SECRET" in text(path): escaped(target)
stopped(f"only {sorted(kinds)[:6]}")""",
        stopped_by=("no other descriptors",),
    ),
    Attempt(
        name="another user",
        tries="becomes another user",
        script="os.setuid(12345); escaped('user 12345')",
        stopped_by=("user namespace", "no capabilities"),
        bound="one_user",
    ),
    Attempt(
        name="host's user namespace",
        tries="is the host's own user, by the map of its user namespace",
        script="""
told = text("/proc/self/uid_map").split()
escaped(str(told)) if told == ["0", "0", "4294967295"] else stopped(f"its map is {told}")""",
        stopped_by=("user namespace",),
    ),
    Attempt(
        name="set-user-id programs",
        tries="gains rights by executing a program",
        script="""
told = dict(line.split(":\\t", 1) for line in text("/proc/self/status").splitlines() if ":\\t" in line)
escaped("no_new_privs is off") if told["NoNewPrivs"] != "1" else stopped("no_new_privs is on")""",
        stopped_by=("no new privileges",),
    ),
    Attempt(
        name="raw packets",
        tries="opens a raw socket",
        script="socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP); escaped('a raw socket')",
        stopped_by=("no capabilities", "no nested user namespaces", "user namespace"),
    ),
    Attempt(
        name="capabilities",
        tries="looks for capabilities that were left to it",
        script="""
told = dict(line.split(":\\t", 1) for line in text("/proc/self/status").splitlines() if ":\\t" in line)
allowed = bait["bounds"].get("capabilities", 0)
names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
held = {name: told[name] for name in names if int(told[name], 16) & ~allowed}
escaped(str(held)) if held else stopped(f"it has none but {allowed:#x}")""",
        stopped_by=("no capabilities",),
    ),
)

_SOCKETS = (
    Attempt(
        name="loopback ports",
        tries="connects to a port of the host's loopback",
        script="socket.create_connection(('127.0.0.1', bait['port']), 2); escaped(f'port {bait[\"port\"]}')",
        stopped_by=("network namespace",),
    ),
    Attempt(
        name="abstract sockets",
        tries="connects to an abstract Unix socket of the host",
        script="s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + bait['abstract']); escaped('it answered')",
        stopped_by=("network namespace",),
    ),
    Attempt(
        name="interfaces",
        tries="looks for an interface that leads out",
        script="""
names = [name for _, name in socket.if_nameindex()]
escaped(str(names)) if set(names) - {"lo"} else stopped(f"only {names}")""",
        stopped_by=("network namespace",),
    ),
    Attempt(
        name="keeper's socket",
        tries="connects to the socket by which the hive's keeper is led",
        script="""
absent("no keeper leads this hive") if not bait["run_dir"] else None
path = [path for depth in ("", "*/") for path in glob.glob(f"{bait['run_dir']}/{depth}keeper.sock")]
stopped("its directory is not there") if not path else None
socket.socket(socket.AF_UNIX).connect(path[0])
escaped(path[0])""",
        stopped_by=("sockets out of sight",),
    ),
    Attempt(
        name="neighbour's socket",
        tries="connects to the socket of another sandbox",
        script="""
absent("no Unix socket leads to it") if not bait["other"] else None
socket.socket(socket.AF_UNIX).connect(bait["other"])
escaped(bait["other"])""",
        stopped_by=("sockets out of sight",),
    ),
    Attempt(
        name="socket swapped",
        tries="puts a symbolic link to another sandbox's socket in the place of its own",
        script="""
absent("no Unix socket leads to it") if not bait["other"] else None
own = bait["socket"]
os.rename(own, own + ".old")
os.symlink(bait["other"], own)
os.rename(own + ".old", own)
escaped(own)""",
        stopped_by=("sockets out of sight",),
    ),
    Attempt(
        name="name of the listener",
        tries="asks the kernel where on the host its listener is",
        script="""
absent("it listens on TCP") if not bait["run_dir"] else None
told = text("/proc/net/unix")
escaped("in /proc/net/unix") if bait["run_dir"] in told else stopped("the kernel knows a relative path only")""",
        stopped_by=("relative socket names",),
    ),
    Attempt(
        name="shared memory",
        tries="reads a System V segment of the host that everybody may read",
        script="""
absent("the host has none") if not bait["shared_memory"] else None
number = libc.shmget(bait["shared_memory"], 0, 0)
escaped(f"segment {number}") if number >= 0 else stopped(errno.errorcode[ctypes.get_errno()])""",
        stopped_by=("ipc namespace",),
    ),
    Attempt(
        name="host name",
        tries="asks for the host's name",
        script="""
name = os.uname().nodename
escaped(name) if name == bait["hostname"] else stopped(f"it is told {name}")""",
        stopped_by=("uts namespace",),
    ),
    Attempt(
        name="control group",
        tries="reads in which group of the host it is",
        script="""
paths = {line.split(":", 2)[2] for line in text("/proc/self/cgroup").splitlines()}
escaped(str(paths)) if paths - {"/"} else stopped(f"it is told {paths}")""",
        stopped_by=("control group namespace",),
    ),
)

_NEIGHBOUR = (
    Attempt(
        name="neighbour's files",
        tries="reads what another sandbox wrote into its workspace, home, /tmp and /dev/shm",
        script="""
places = ("/workspace", "/home/ash", "/tmp", "/dev/shm")
found = [place for place in places if "neighbour" in text(place + "/note")]
escaped(str(found)) if found else stopped("no such file is there")""",
        stopped_by=("own workspace",),
    ),
    Attempt(
        name="neighbour's memory",
        tries="reads the environment of another sandbox's processes",
        script="""
found = [path for path in glob.glob("/proc/[0-9]*/environ") if "NEIGHBOUR_SECRET" in text(path)]
escaped(str(found)) if found else stopped("none of its processes can be read")""",
        stopped_by=("process namespace", "user namespace"),
    ),
)

SURROUNDINGS = (*_FILES, *_PROCESSES, *_SOCKETS, *_NEIGHBOUR)
