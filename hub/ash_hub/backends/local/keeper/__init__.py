"""The keeper: the process that owns a hive's local sandboxes, so that they outlive the hub.

It runs on the standard library alone and imports nothing else of Ash (`python -I -S`, no site packages), has no
secret in its arguments or environment, and stays on one thread: the kernel kills a sandbox when the *thread* that
started it ends. One keeper holds the lock of a state directory; the hubs of one hive send it requests
over a Unix socket.

    main.py      start: lock, detach, ready line; end: leave nothing behind
    control.py   the socket: newline-delimited JSON, the hubs, the grace timer
    sandbox.py   one sandbox from launch to its last process
    snapshots.py what was frozen of sandboxes, until nobody has it; live_copy.py: the same of one that goes on
    launchers/   start its processes from a plan, isolated or not
    egress.py    starts the egress proxy, a process of its own, and tells it of sandboxes
    cgroups.py   control groups, version 2 or 1
    user_ranges.py       ranges of the host's users, each for one sandbox at a time
    used_directories.py  directories that sandboxes begin as: held, or removed
    system_copy.py       copies the host's system for an ordinary user's machines, a program of its own
    tail.py      the bounded log of a sandbox
"""
