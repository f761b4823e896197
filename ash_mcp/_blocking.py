"""An event loop in a thread, and handles whose methods wait for coroutines in it."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, Concatenate, Final, Generic, NamedTuple, ParamSpec, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from ash_mcp.errors import LocalProtocolError

__all__ = ["BlockingHandle", "LoopThread", "direct", "inner_of", "returning", "waited"]

P = ParamSpec("P")
T = TypeVar("T")
Inner = TypeVar("Inner")
Made = TypeVar("Made")

_CLEANUP_SECONDS: Final = 30.0
"""How long an interrupted call is waited for: as long as the longest clean-up of the SDK may take."""


class LoopThread:
    """An event loop in a thread, started at its first use. Several threads may use it at once."""

    def __init__(self) -> None:
        self._inherited: list[_Running | None] = []
        """Of the processes that forked this one. Kept and never stopped: their loops share descriptors with ours."""
        self._closed = False
        self._reset()
        _loops.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def leave_inherited(self) -> None:
        """After a fork, which copies no threads: start a new one at the next use."""
        self._inherited.append(self._running)
        self._reset()

    def run(self, do: Callable[[], Awaitable[T]]) -> T:
        """Run `do` in the loop and wait for it; Ctrl-C here cancels it there and waits for its clean-up.

        Raises:
            LocalProtocolError: The loop is closed.
        """
        ended = threading.Event()

        async def task() -> T:
            try:
                return await do()
            finally:
                ended.set()

        future = self._open().start_task_soon(task)
        try:
            return future.result()
        except BaseException:
            if future.cancel():  # False when the exception is the call's own
                ended.wait(_CLEANUP_SECONDS)
            raise

    def start(self, do: Callable[[], Awaitable[T]]) -> Future[T]:
        """Run `do` in the loop beside what is waited for there; cancelling what is returned cancels it.

        Raises:
            LocalProtocolError: The loop is closed.
        """
        return self._open().start_task_soon(do)

    def _open(self) -> BlockingPortal:
        with self._lock:
            if self._closed:
                raise LocalProtocolError("this Hive is closed; make a new one")
            if self._running is None:
                self._running = _start(self)
            return self._running.portal

    def close(self) -> None:
        """Wait for the calls that run and end the thread. Idempotent."""
        with self._lock:
            self._closed = True
            running, self._running = self._running, None
            if running is not None:
                running.at_end.detach()
                _stop(running.portal, running.thread, cancel=False)

    @property
    def is_open(self) -> bool:
        return self._running is not None


class _Running(NamedTuple):
    portal: BlockingPortal
    thread: threading.Thread
    at_end: weakref.finalize[..., LoopThread]
    """Stops it when its owner was never closed: at the owner's end or the interpreter's, which would hang."""


def _start(owner: LoopThread) -> _Running:
    started: Future[BlockingPortal] = Future()
    thread = threading.Thread(target=_run_loop, args=(started,), name="ash-loop", daemon=True)
    thread.start()
    portal = started.result()
    return _Running(portal, thread, weakref.finalize(owner, _stop, portal, thread, cancel=True))


def _stop(portal: BlockingPortal, thread: threading.Thread, *, cancel: bool) -> None:
    if thread.is_alive():  # not in a process that was forked since
        with contextlib.suppress(RuntimeError):  # it has just stopped, or this is the loop's own thread
            portal.call(portal.stop, cancel)
            thread.join()


def _run_loop(started: Future[BlockingPortal]) -> None:
    """Run a loop until its portal is stopped. (A `start_blocking_portal` left open hangs the interpreter's exit.)"""
    try:
        anyio.run(_serve, started)
    except BaseException as exc:
        if started.done():
            raise
        started.set_exception(exc)


async def _serve(started: Future[BlockingPortal]) -> None:
    async with BlockingPortal() as portal:
        started.set_result(portal)
        await portal.sleep_until_stopped()


_loops: weakref.WeakSet[LoopThread] = weakref.WeakSet()


def _after_fork() -> None:
    for loop in list(_loops):
        loop.leave_inherited()


if hasattr(os, "register_at_fork"):  # not where there is no fork
    os.register_at_fork(after_in_child=_after_fork)


class BlockingHandle(Generic[Inner]):
    """An object of the async SDK and the loop that it lives in."""

    def __init__(self, loop: LoopThread, inner: Inner) -> None:
        self._loop = loop
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner)


def _parts(handle: BlockingHandle[Any]) -> tuple[LoopThread, Any]:
    return handle._loop, handle._inner  # pyright: ignore[reportPrivateUsage]


def inner_of(handle: BlockingHandle[Inner]) -> Inner:
    """Return the handle of the async SDK behind one, as of this process."""
    return _parts(handle)[1]


def waited(
    method: Callable[Concatenate[Any, P], Awaitable[T]],
) -> Callable[Concatenate[BlockingHandle[Any], P], T]:
    """Return an async method as one that blocks, with the same arguments and docstring."""

    @wraps(method)
    def call(handle: BlockingHandle[Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        loop, inner = _parts(handle)
        return loop.run(partial(method, inner, *args, **kwargs))

    return call


def direct(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[BlockingHandle[Any], P], T]:
    """Return a method that awaits nothing, with the same arguments and docstring."""

    @wraps(method)
    def call(handle: BlockingHandle[Any], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return method(_parts(handle)[1], *args, **kwargs)

    return call


def returning(
    handle_type: Callable[[LoopThread, Inner], Made],
    method: Callable[Concatenate[BlockingHandle[Any], P], Inner],
) -> Callable[Concatenate[BlockingHandle[Any], P], Made]:
    """Return a method of a handle that gives out what it made as another handle."""

    @wraps(method)
    def call(handle: BlockingHandle[Any], /, *args: P.args, **kwargs: P.kwargs) -> Made:
        return handle_type(_parts(handle)[0], method(handle, *args, **kwargs))

    setattr(call, "__signature__", inspect.signature(method).replace(return_annotation=handle_type))  # noqa: B010
    return call
