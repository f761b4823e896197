"""The errors of Ash, one tree.

    AshError                       kind, retryable, trainable
      ConfigError                  a bad recipe or setting, or bad arguments
      RequestRefused               the hive said no
        NotFound                   SandboxNotFound, RecipeNotFound, ToolNotFound
        Conflict                   SessionTaken, LeaseHeld, LeaseLost
        CapacityExceeded           a pool, a quota, a limit; retry_after_seconds
        PermissionDenied           Unauthenticated
        Unsupported                what this backend, image or protocol era does not have
      SandboxError                 StartFailed(step), SandboxGone(reason)
        SandboxRefused             a sandbox's own word on a call: JobNotFound, CommandNotStarted
          FileError                FileNotFound, FileExists, IsADirectory, NotADirectory, FileNotPermitted, NoSpace
      CommandFailed                only from exec(check=True)
      TransportError               ConnectFailed, AshTimeout, StreamBroken
      ProtocolError                LocalProtocolError, RemoteProtocolError
      HiveFault                    a defect of the hive itself

`kind` is the stable name on the wire. `retryable` says that the same request may succeed later without change
and has not run. `trainable` says that the failure is a consequence of what the caller did, so that a trainer may
learn from it; a failure of ours is never trainable. What a sandbox itself says of a call (`SandboxRefused`) is
trainable and not retryable, whatever it claims. `wire.py` maps each kind to its HTTP and JSON-RPC codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "AshError",
    "AshTimeout",
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
    "LeaseHeld",
    "LeaseLost",
    "LocalProtocolError",
    "NoSpace",
    "NotADirectory",
    "NotFound",
    "PermissionDenied",
    "ProtocolError",
    "RecipeNotFound",
    "RemoteProtocolError",
    "RequestRefused",
    "SandboxError",
    "SandboxGone",
    "SandboxNotFound",
    "SandboxRefused",
    "SessionTaken",
    "StartFailed",
    "StreamBroken",
    "ToolNotFound",
    "TransportError",
    "Unauthenticated",
    "Unsupported",
]


class AshError(Exception):
    """Any failure that Ash names. `data` holds JSON values that go with it over the wire."""

    kind: ClassVar[str] = "ash_error"
    retryable: bool = False
    trainable: bool = False

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        trainable: bool | None = None,
        **data: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.data: Mapping[str, Any] = {key: value for key, value in data.items() if value is not None}
        if retryable is not None:
            self.retryable = retryable
        if trainable is not None:
            self.trainable = trainable


class ConfigError(AshError):
    """A recipe, a setting or an argument is wrong; the message says which and what is accepted."""

    kind = "bad_request"
    trainable = True


class RequestRefused(AshError):
    """The hive understood and said no."""

    kind = "refused"
    trainable = True


class NotFound(RequestRefused):
    kind = "not_found"


class SandboxNotFound(NotFound):
    """No sandbox of the caller's has that session name or id."""

    kind = "sandbox_not_found"


class RecipeNotFound(NotFound):
    kind = "recipe_not_found"


class ToolNotFound(NotFound):
    kind = "tool_not_found"


class Conflict(RequestRefused):
    kind = "conflict"


class SessionTaken(Conflict):
    kind = "session_taken"


class LeaseHeld(Conflict):
    kind = "lease_held"
    trainable = False


class LeaseLost(Conflict):
    kind = "lease_lost"
    trainable = False


class CapacityExceeded(RequestRefused):
    """A limit is reached; `retry_after_seconds` says when to come back."""

    kind = "capacity_exceeded"
    retryable = True
    trainable = False

    @property
    def retry_after_seconds(self) -> float:
        return float(self.data.get("retry_after_seconds", 1.0))


class PermissionDenied(RequestRefused):
    kind = "permission_denied"


class Unauthenticated(PermissionDenied):
    kind = "unauthenticated"


class Unsupported(RequestRefused):
    """This backend, image, host or protocol era does not have what was asked for."""

    kind = "unsupported"


class SandboxError(AshError):
    kind = "sandbox_error"


class StartFailed(SandboxError):
    """A spawn failed; `data["step"]` names the step and `data["log"]` has the last lines of the sandbox's log."""

    kind = "start_failed"
    retryable = True


class SandboxGone(SandboxError):
    """The sandbox has ended; `data["reason"]` is an `EndReason`."""

    kind = "sandbox_gone"


class SandboxRefused(SandboxError):
    """The sandbox itself answered that it could not do what was asked; its own word, never the hive's."""

    kind = "sandbox_refused"
    trainable = True


class JobNotFound(SandboxRefused):
    kind = "job_not_found"


class CommandNotStarted(SandboxRefused):
    """The command could not be started: its program or its working directory does not exist, say."""

    kind = "spawn_failed"


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
    """A command run with `check=True` exited with another code than 0; `result` has all of it."""

    kind = "command_failed"
    trainable = True

    def __init__(self, message: str, *, result: Any = None, **data: Any) -> None:
        super().__init__(message, **data)
        self.result = result


class TransportError(AshError):
    kind = "transport_error"


class ConnectFailed(TransportError):
    """Nothing was sent: the other side could not be reached."""

    kind = "connect_failed"
    retryable = True


class AshTimeout(TransportError, TimeoutError):
    """A bound ran out. Whether the work was done is unknown unless `retryable` says so."""

    kind = "timeout"


class StreamBroken(TransportError):
    """A stream ended before its last message; `last_event_id` is where to resume, if it can be."""

    kind = "stream_broken"

    @property
    def last_event_id(self) -> str | None:
        return self.data.get("last_event_id")


class ProtocolError(AshError):
    kind = "protocol_error"


class LocalProtocolError(ProtocolError):
    """We were about to break the protocol."""

    kind = "local_protocol_error"


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol."""

    kind = "remote_protocol_error"


class HiveFault(AshError):
    """A defect of the hive itself; its log has the details."""

    kind = "hive_fault"
