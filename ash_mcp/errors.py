"""The errors of Ash, one tree.

    AshError                       kind, retryable, trainable
      ConfigError                  a bad recipe or setting, or bad arguments
      RequestRefused               the hive said no
        NotFound                   SandboxNotFound, RecipeNotFound, RunNotFound, SnapshotNotFound,
                                   ToolNotFound
        Conflict                   SessionTaken, RunTaken, RunEnded
        CapacityExceeded           a pool, a quota, a limit; retry_after_seconds
        PermissionDenied           Unauthenticated, PortNotAllowed
        Unsupported                what this backend, image or protocol era does not have
      SandboxError                 StartFailed(step), SandboxGone(reason), SandboxReset, PortClosed
        SandboxRefused             the sandbox's own answer: BadArguments, JobNotFound, PtyNotFound, CommandNotStarted,
                                     ResultLost
          FileError                FileNotFound, FileExists, IsADirectory, NotADirectory, FileNotPermitted, NoSpace
      CommandFailed                only from exec(check=True)
      TransportError               ConnectFailed, AshTimeout, StreamBroken
      ProtocolError                LocalProtocolError, RemoteProtocolError
      HiveFault                    a defect of the hive itself

`kind` is the stable name on the wire. `retryable` says that the same request may succeed later without change
and has not run. `trainable` says that what the caller did in a working sandbox is the cause, so that a trainer may
learn from it. It follows from the class alone, by `TRAINABLE` below.
`wire.py` maps each kind to its HTTP and JSON-RPC codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

__all__ = [
    "AshError",
    "AshTimeout",
    "BadArguments",
    "CapacityExceeded",
    "CommandFailed",
    "CommandNotStarted",
    "ConfigError",
    "Conflict",
    "ConnectFailed",
    "FileError",
    "FileExists",
    "FileNotFound",
    "FileNotPermitted",
    "HiveFault",
    "IsADirectory",
    "JobNotFound",
    "LocalProtocolError",
    "NoSpace",
    "NotADirectory",
    "NotFound",
    "PermissionDenied",
    "PortClosed",
    "PortNotAllowed",
    "ProtocolError",
    "PtyNotFound",
    "RecipeNotFound",
    "RemoteProtocolError",
    "RequestRefused",
    "ResultLost",
    "RunEnded",
    "RunNotFound",
    "RunTaken",
    "SandboxError",
    "SandboxGone",
    "SandboxNotFound",
    "SandboxRefused",
    "SandboxReset",
    "SessionTaken",
    "SnapshotNotFound",
    "StartFailed",
    "StreamBroken",
    "ToolNotFound",
    "TransportError",
    "Unauthenticated",
    "Unsupported",
]


class AshError(Exception):
    """Base of all errors of Ash. `data` holds JSON values that go with it over the wire."""

    kind: ClassVar[str] = "ash_error"
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        **data: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.data: Mapping[str, Any] = {key: value for key, value in data.items() if value is not None}
        if retryable is not None:
            self.retryable = retryable

    @property
    def trainable(self) -> bool:
        """Whether a trainer may learn from it."""
        return isinstance(self, TRAINABLE)


class ConfigError(AshError):
    """A recipe, a setting or an argument is wrong; the message says which and what is accepted."""

    kind = "bad_request"


class RequestRefused(AshError):
    """The hive understood the request and refused it."""

    kind = "refused"


class NotFound(RequestRefused):
    """What the request names does not exist."""

    kind = "not_found"


class SandboxNotFound(NotFound):
    """No sandbox of the caller's has that session name or id."""

    kind = "sandbox_not_found"


class RecipeNotFound(NotFound):
    """The hive has no recipe of that name; the message lists those it has."""

    kind = "recipe_not_found"


class RunNotFound(NotFound):
    """No run of the caller's has that name or id."""

    kind = "run_not_found"


class SnapshotNotFound(NotFound):
    """No snapshot of the caller's has that id, or no longer."""

    kind = "snapshot_not_found"


class ToolNotFound(NotFound):
    """The hive or the sandbox has no tool of that name."""

    kind = "tool_not_found"


class Conflict(RequestRefused):
    """The request contradicts what exists."""

    kind = "conflict"


class SessionTaken(Conflict):
    """A living sandbox of the caller's has that session name."""

    kind = "session_taken"


class RunTaken(Conflict):
    """A run of that name is open; `data["left_seconds"]` says what is left of its lease."""

    kind = "run_taken"


class RunEnded(Conflict):
    """The run has ended, and nothing can be spawned in it; `data["reason"]` is an `EndReason`."""

    kind = "run_ended"


class CapacityExceeded(RequestRefused):
    """A limit is reached; `retry_after_seconds` says when to come back."""

    kind = "capacity_exceeded"
    retryable = True

    @property
    def retry_after_seconds(self) -> float:
        return float(self.data.get("retry_after_seconds", 1.0))


class PermissionDenied(RequestRefused):
    """The caller is known and may not do this."""

    kind = "permission_denied"


class Unauthenticated(PermissionDenied):
    """The token is missing or not accepted."""

    kind = "unauthenticated"


class PortNotAllowed(PermissionDenied):
    """The sandbox was spawned without this port in `ports`."""

    kind = "port_not_allowed"


class Unsupported(RequestRefused):
    """This backend, image, host or protocol era does not have what was asked for."""

    kind = "unsupported"


class SandboxError(AshError):
    """A sandbox failed, or itself refused a call."""

    kind = "sandbox_error"


class StartFailed(SandboxError):
    """A spawn failed; `data["step"]` names the step and `data["log"]` has the last lines of the sandbox's log.

    Where its main process or its pod ended, or it waited for its host, `data["cause"]` is the `Cause`.
    """

    kind = "start_failed"
    retryable = True


class SandboxGone(SandboxError):
    """The sandbox has ended; `data["reason"]` is an `EndReason`, and `data["cause"]` a `Cause`."""

    kind = "sandbox_gone"


class PortClosed(SandboxError):
    """Nobody listens on this port of the sandbox: its server has not started yet, or has ended."""

    kind = "port_closed"
    retryable = True


class SandboxReset(SandboxError):
    """The sandbox was frozen or reset during the call, which ended with what ran there; the sandbox goes on."""

    kind = "sandbox_reset"


class SandboxRefused(SandboxError):
    """The sandbox itself, not the hive, answered that it could not do what was asked."""

    kind = "sandbox_refused"


class BadArguments(SandboxRefused, ConfigError):
    """The sandbox itself found the arguments of a call wrong."""

    kind = "bad_arguments"


class JobNotFound(SandboxRefused):
    """The sandbox has no such job, or no longer."""

    kind = "job_not_found"


class PtyNotFound(SandboxRefused):
    """The sandbox has no such terminal, or no longer."""

    kind = "pty_not_found"


class CommandNotStarted(SandboxRefused):
    """The command could not be started: its program or its working directory does not exist, say."""

    kind = "spawn_failed"


class ResultLost(SandboxRefused):
    """A call was repeated too late after its answer was lost: its command ran once, and its result is gone."""

    kind = "result_lost"


class FileError(SandboxRefused):
    """A file operation inside the sandbox failed."""

    kind = "file_error"


class FileNotFound(FileError, FileNotFoundError):
    kind = "file_not_found"


class FileExists(FileError, FileExistsError):
    kind = "file_exists"


class IsADirectory(FileError, IsADirectoryError):
    kind = "is_a_directory"


class NotADirectory(FileError, NotADirectoryError):
    kind = "not_a_directory"


class FileNotPermitted(FileError, PermissionError):
    kind = "not_permitted"


class NoSpace(FileError):
    kind = "no_space"


class CommandFailed(AshError):
    """A command run with `check=True` exited with another code than 0 or timed out; `result` is its `ExecResult`."""

    kind = "command_failed"

    def __init__(self, message: str, *, result: Any = None, **data: Any) -> None:
        super().__init__(message, **data)
        self.result = result


class TransportError(AshError):
    """The connection failed, before the request was sent or after."""

    kind = "transport_error"


class ConnectFailed(TransportError):
    """Nothing was sent: the other side could not be reached."""

    kind = "connect_failed"
    retryable = True


class AshTimeout(TransportError, TimeoutError):
    """A bound ran out. Whether the work was done is unknown unless `retryable` says so."""

    kind = "timeout"


class StreamBroken(TransportError):
    """The connection broke before the answer; `last_event_id` is where to resume, if the stream can be resumed."""

    kind = "stream_broken"

    @property
    def last_event_id(self) -> str | None:
        return self.data.get("last_event_id")


class ProtocolError(AshError):
    """One side broke the protocol."""

    kind = "protocol_error"


class LocalProtocolError(ProtocolError):
    """This side used an object out of turn, such as a closed handle or a result before its end."""

    kind = "local_protocol_error"


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol."""

    kind = "remote_protocol_error"


class HiveFault(AshError):
    """A defect of the hive itself; its log has the details."""

    kind = "hive_fault"


TRAINABLE: Final[tuple[type[AshError], ...]] = (SandboxRefused, CommandFailed)
"""What a trainer may learn from: refusals of a sandbox itself, and how a command in it ended.

All else comes from the hive, the connection or this SDK: credentials, configuration, quotas, lost sandboxes, outages.
A sandbox cannot get out of this: whatever kind it names, its refusals are `SandboxRefused`.
"""
