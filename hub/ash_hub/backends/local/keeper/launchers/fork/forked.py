"""From a copy of the fork parent to the first process of a sandbox, and to what runs in it.

The channel brings one message, `{"plan", "names"}` with the plan's descriptors under their names and `log`, `life`,
`status`, `group.N` and perhaps `hold` beside them. It tells `first` with a descriptor of the sandbox's first process,
then `init` when the walls stand, and is closed once the main process runs. What goes wrong before is written to the
log. The first process writes how it ended to `status`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..init import exit_code, harden, until_ended, watch
from ..rlimits import limit
from . import kernel, walls

__all__ = ["become"]

_MOST_BYTES = 180_000
_MOST_DESCRIPTORS = 64
_WALLS_SECONDS = 30.0
_MARK = re.compile(r"@fd:([a-z0-9_.-]+)@")
_PR_SET_NAME = 15

Json = Mapping[str, Any]


def become(channel: int, maker: int, main: Callable[[], int]) -> NoReturn:
    """Leave the parent behind: be what the channel says behind the walls that were made for it. Never return."""
    try:
        _fresh_signals()
        door = socket.socket(fileno=channel)
        os.set_inheritable(channel, False)
        data, descriptors, _, _ = socket.recv_fds(door, _MOST_BYTES, _MOST_DESCRIPTORS)
        if data:  # else the keeper has given it up
            given = json.loads(data)
            names: dict[str, int] = dict(zip(given["names"], descriptors, strict=True))
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            os.dup2(names["log"], 1)
            os.dup2(names["log"], 2)
            _join(names)
            walls.enter(_received(maker), users=given["plan"]["identity"]["users"])
            walls.leave_kinds(processes=True)
            if kernel.fork() == 0:
                _be_first(given["plan"], door, names, main)
    except OSError as error:
        os.write(2, f"the sandbox's walls could not be made: {error}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(0)


def _received(maker: int) -> list[int]:
    """Return the namespaces that are made for this sandbox, once they are.

    Raises:
        OSError: They could not be made.
    """
    with socket.socket(fileno=maker) as source:
        source.settimeout(_WALLS_SECONDS)
        _, namespaces, _, _ = socket.recv_fds(source, 1, _MOST_DESCRIPTORS)
    if not namespaces:
        raise OSError(0, "see the log of the keeper")
    return namespaces


def _fresh_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _join(names: Mapping[str, int]) -> None:
    for name, descriptor in names.items():
        if name.startswith("group."):
            os.write(descriptor, b"0")


def _be_first(plan: Json, door: socket.socket, names: dict[str, int], main: Callable[[], int]) -> None:
    """Be the first process of the sandbox: start the main process, reap, and end."""
    me = os.pidfd_open(os.getpid())
    kernel.send_patiently(door, b"first\n", [me])
    os.setsid()
    walls.finish(plan["mounts"])
    os.chdir(plan["directory"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kept = {name: number for name, number in names.items() if name != "log" and not name.startswith("group.")}
    kernel.close_all_but({0, 1, 2, door.fileno(), *kept.values()})
    for name, wanted in plan["rlimits"].items():
        limit(name, wanted)
    code = plan["system_call_filter"]
    kernel.bound_capabilities(plan["kept_capabilities"])
    kernel.set_capabilities(plan["kept_capabilities"])
    kernel.filter_calls(None if code is None else base64.b64decode(code))
    status, life, hold = kept.pop("status"), kept.pop("life"), kept.pop("hold", None)
    usual = watch(life)
    door.send(b"init\n", socket.MSG_NOSIGNAL)
    harden(tree=False)
    if plan["processes"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (plan["processes"], plan["processes"]))
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        os.close(status)
        os.close(life)
        if hold is not None:
            os.close(hold)
        _run(plan, door, kept, main)
    for number in kept.values():
        os.close(number)
    door.close()
    ended = exit_code(until_ended(child, life))
    os.pwrite(status, str(ended).encode(), 0)
    os._exit(ended)


def _run(plan: Json, door: socket.socket, descriptors: Mapping[str, int], main: Callable[[], int]) -> NoReturn:
    """Run the plan's command, or be what the parent has loaded in its place."""
    for number in descriptors.values():
        os.set_inheritable(number, True)
    environment = {key: _substituted(value, descriptors) for key, value in plan["environment"].items()}
    code = 1
    try:
        if plan["is_loaded"]:
            os.environ.clear()
            os.environ.update(environment)
            _fresh_random()
            ctypes.CDLL(None).prctl(_PR_SET_NAME, b"python3", 0, 0, 0)
            door.close()
            code = main()
        else:
            words = [_substituted(word, descriptors) for word in plan["command"]]
            try:
                os.execvpe(words[0], words, environment)
            except OSError as error:
                door.send(f"could not run {words[0]}: {error.strerror}".encode(), socket.MSG_NOSIGNAL)
                code = 127
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _fresh_random() -> None:
    """Part from the parent's random state; what `random` and OpenSSL do after a fork themselves is done once more."""
    import random
    import tempfile

    random.seed()
    setattr(tempfile, "_name_sequence", None)  # noqa: B010 - it looks at the pid, which siblings share
    ssl: Any = sys.modules.get("ssl")
    if ssl is not None:
        ssl.RAND_add(os.urandom(32), 32.0)
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()


def _substituted(word: str, numbers: Mapping[str, int]) -> str:
    match = _MARK.fullmatch(word)
    return word if match is None else str(numbers[match[1]])
