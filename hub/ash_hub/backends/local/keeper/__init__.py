"""The keeper: the process that owns a hive's local sandboxes, so that they do not hang on the life of the hub.

It runs on the standard library alone and imports nothing else of Ash (`python -I -S`, no site packages), has no
secret in its arguments or environment, and stays on one thread: the kernel kills a sandbox when the *thread* that
started it ends. One keeper holds the lock of a state directory; one hub at a time leads it over a Unix socket.

    main.py      start: lock, detach, ready line; end: leave nothing behind
    control.py   the socket: newline-delimited JSON, one leader, the grace timer
    sandbox.py   one sandbox from launch to its last process
    launch.py    a launch plan turned into descriptors and a child process
    egress.py    the egress proxy, a process of its own that the keeper owns like a sandbox
    cgroups.py   control groups, version 2 or 1
    tail.py      the bounded log of a sandbox
"""
