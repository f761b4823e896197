"""Starts the egress proxy with the first sandbox that may go out, and again when it dies, and tells it of each.

The keeper makes each sandbox's listening socket and keeps it, so that a new proxy takes over where the old one left
off; what is said meanwhile waits in the socket's queue. `ash_hub/egress/main.py` describes the messages.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = ["OUTLET_NAME", "Egress"]

OUTLET_NAME = "proxy.sock"
"""The egress proxy's socket, in a directory that the sandbox sees."""
_MESSAGE_BYTES = 192 * 1024
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0
_STABLE_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_PASSING = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
"""The kernel has no room for a message now. What all processes of a user have in flight counts, sandboxes' too."""

Message = Mapping[str, Any]


class Egress:
    """The proxy of all sandboxes of one hive.

    Args:
        command: The words that start a proxy.
        on_decision: Takes each decision that the proxy reports; its `sandbox` says whose.
    """

    def __init__(self, command: Sequence[str], on_decision: Callable[[Message], None]) -> None:
        self._command = command
        self._on_decision = on_decision
        self._ports: list[int] = []
        self._listeners: dict[str, tuple[socket.socket, Message]] = {}
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent: deque[tuple[Message, socket.socket | None]] = deque()
        self._awaited: dict[str, list[tuple[int, asyncio.Future[None]]]] = {}
        """By sandbox, the numbers of the messages that the proxy has not yet said it follows."""
        self._numbers = itertools.count(1)
        self.problem = "the egress proxy does not answer"
        """Why it may take long to serve another sandbox."""
        self._retry: asyncio.TimerHandle | None = None
        self._pause = _FIRST_PAUSE_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._started_at = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def hive_listens_on(self, ports: Iterable[int]) -> None:
        """Name the hive's own ports, which no policy lets a sandbox reach on this host."""
        self._ports = list(ports)
        self._send({"op": "configure", "own_ports": self._ports})

    def add(self, name: str, listener: socket.socket, network: Message) -> asyncio.Future[None]:
        """Serve `listener`, which belongs to this object from now on, under a policy and its limits.

        Returns:
            What is done when the proxy serves it, or when it is removed.
        """
        message = self._numbered({"op": "add", "id": name, **network})
        self._listeners[name] = listener, message
        served = self._await(message)
        if self._control is not None:
            self._send(message, listener)
        elif self._timer is None:
            self._start()
        return served

    def set_policy(self, name: str, policy: Any) -> asyncio.Future[None]:
        """Have a sandbox that was added follow another policy, and a new proxy from its start.

        Returns:
            What is done when nothing passes that the policy refuses, or when the sandbox is removed.
        """
        listener, before = self._listeners[name]
        message = self._numbered({**before, "policy": policy})
        self._listeners[name] = listener, message
        followed = self._await(message)
        if self._control is None:
            followed.set_result(None)  # no proxy runs, so nothing passes
        self._send({key: message[key] for key in ("id", "n", "policy")} | {"op": "policy"})
        return followed

    def _numbered(self, message: Message) -> Message:
        return {**message, "n": next(self._numbers)}

    def _await(self, message: Message) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(message["id"], []).append((message["n"], future))
        return future

    def remove(self, name: str) -> None:
        """End every connection of a sandbox; no-op if it has no network."""
        if found := self._listeners.pop(name, None):
            self._settle(name)
            found[0].close()
            self._send({"op": "remove", "id": name})

    def end(self) -> None:
        """End the proxy, with all connections; it is gone when this returns."""
        for name in list(self._listeners):
            self.remove(name)
        if self._timer is not None:
            self._timer.cancel()
        process = self._process
        self._disconnect()
        _killed(process)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer, self._started_at = None, loop.time()
        try:
            ours, self._process = _proxy_process(self._command)
        except OSError as error:
            self._start_again(str(error))
            return
        self._control = ours
        loop.add_reader(ours, self._readable, ours)
        self._send({"op": "configure", "own_ports": self._ports})
        for listener, message in self._listeners.values():
            self._send(message, listener)

    def _send(self, message: Message, listener: socket.socket | None = None) -> None:
        if self._control is not None:
            self._unsent.append((message, listener))
            self._flush()

    def _flush(self) -> None:
        """Send what can be sent without waiting: a proxy that is slow must not hold up the keeper."""
        control = self._control
        while control is not None and self._unsent:
            message, listener = self._unsent[0]
            # A sandbox that has ended meanwhile has closed its listener; what removes it follows.
            descriptors = [] if listener is None or listener.fileno() < 0 else [listener.fileno()]
            try:
                if listener is None or descriptors:
                    socket.send_fds(control, [json.dumps(message).encode()], descriptors)
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(control, self._flush)
                return
            except OSError as error:
                if error.errno in _PASSING:
                    self.problem = f"the egress proxy cannot be told of it: {error.strerror}"
                    if self._retry is None:
                        self._retry = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._flush_again)
                return  # else it has died, which the reader sees, too
            self._unsent.popleft()
        if control is not None:
            asyncio.get_running_loop().remove_writer(control)

    def _flush_again(self) -> None:
        self._retry = None
        self._flush()

    def _readable(self, control: socket.socket) -> None:
        try:
            data = control.recv(_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._died()
            return
        message = json.loads(data)
        if message.get("event") == "egress":
            self._on_decision(message)
        elif served := message.get("serves"):
            self._settle(served, message["n"])
        elif unserved := message.get("unserved"):
            self.problem = f"the egress proxy could not take it: {message['why']}"
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._add_again, unserved)

    def _settle(self, name: str, number: float = math.inf) -> None:
        """Let whoever waits for a sandbox's messages up to a number go on."""
        awaited = self._awaited.pop(name, [])
        for _, future in [each for each in awaited if each[0] <= number]:
            if not future.done():
                future.set_result(None)
        if left := [each for each in awaited if each[0] > number]:
            self._awaited[name] = left

    def _add_again(self, name: str) -> None:
        if found := self._listeners.get(name):
            self._send(found[1], found[0])

    def _died(self) -> None:
        process = self._process
        self._disconnect()
        _killed(process)
        self._start_again("it ended")

    def _start_again(self, why: str) -> None:
        if not self._listeners:
            return
        loop = asyncio.get_running_loop()
        stable = loop.time() - self._started_at > _STABLE_SECONDS
        self._pause = _FIRST_PAUSE_SECONDS if stable else min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        self.problem = f"the egress proxy does not run: {why}"
        print(f"egress proxy: {why}; a new one starts in {self._pause:g} s", file=sys.stderr)  # noqa: T201 - its log
        self._timer = loop.call_later(self._pause, self._start)

    def _disconnect(self) -> None:
        control, self._control, self._process = self._control, None, None
        self._unsent.clear()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control)
            asyncio.get_running_loop().remove_writer(control)
            control.close()


def _proxy_process(command: Sequence[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a proxy and return this side of its control socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    try:
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
    except BaseException:
        ours.close()
        raise
    return ours, process


def _killed(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()
