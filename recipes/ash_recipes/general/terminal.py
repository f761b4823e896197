"""A terminal whose working directory and exported variables last from one command to the next.

In an image without bash each command has a plain shell, and nothing lasts.

Every command runs in a bash of its own, so that a command that hangs, exits or breaks its shell spoils nothing. That
bash gets the last one's variables before the command and writes down its own after it, through descriptors of files
in memory: they take commands of any length and need no disk.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from ash_recipes.runner.context import Context
from ash_recipes.runner.execution import Execution, execute
from ash_recipes.runner.files import Files
from ash_recipes.runner.jobs import Job
from ash_recipes.runner.problems import Problem, from_os_error
from ash_recipes.runner.processes import shell_of

__all__ = ["Remembered", "Terminal"]

OUTPUT_BYTES = 32_768
"""What is shown of each stream: about as much as a model can read at once."""
ANSWER_BYTES = 400_000
"""What both streams may take on the wire; they go twice, as text and as an object."""
HISTORY = 50
END = "#ash-end"

_LOW_DESCRIPTOR = 210
"""Scripts number their own descriptors from 3 on and bash its own from 10."""

# Only builtins, so that no PATH of the user's matters. $1, $2 and $3 are the descriptors of the command, of the last
# state and of the place for the next one. The output of `set -x` in a command stays free of these lines, and they
# become one line, so that bash counts the lines of the command from 1.
_SHELL = f"""
IFS= builtin read -r -d '' -u "$1" __ash_command;
IFS= builtin read -r -d '' -u "$2" __ash_state;
builtin eval "exec $1<&- $2<&-";
__ash_next=$3;
builtin set --;
builtin eval "$__ash_state" 2>/dev/null;
SHLVL=1;
builtin unset __ash_state;
__ash_save() {{
  {{ builtin pwd; builtin printf '\\0'; builtin export -p; builtin printf '{END}\\0'; }} >&"$__ash_next";
  builtin return "$1";
}};
builtin trap '{{ __ash_save $?; }} 2>/dev/null' EXIT;
builtin eval "$__ash_command";
{{ __ash_save $?; }} 2>/dev/null
""".replace("\n", " ")


@dataclass(frozen=True, slots=True)
class Remembered:
    """A command of the terminal's history."""

    timestamp: str
    command: str
    success: bool
    exit_code: int


class Terminal:
    """One terminal of a sandbox."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._cwd = context.workspace
        self._variables: str | None = None
        """What bash's `export -p` said last; None before the first command."""
        self.history: deque[Remembered] = deque(maxlen=HISTORY)

    @property
    def cwd(self) -> Path:
        """The working directory, or the workspace when it is gone."""
        return self._cwd if self._cwd.is_dir() else self._context.workspace

    @property
    def files(self) -> Files:
        """File operations with paths relative to the working directory."""
        return Files(self.cwd, kept=(self._context.workspace, self._context.home))

    def resolve(self, path: str) -> str:
        """Return `path` with a leading `~` replaced by the home directory."""
        if path == "~" or path.startswith("~/"):
            return str(self._context.home) + path[1:]
        return path

    def change_directory(self, path: str) -> Path:
        """Make `path` the working directory.

        Raises:
            Problem: It is none, or may not be entered.
        """
        target = self.files.resolve(self.resolve(path))
        try:
            os.close(os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            target = target.resolve(strict=True)
        except OSError as exc:
            raise from_os_error(exc, path) from exc
        if not os.access(target, os.X_OK):
            raise Problem("not_permitted", f"{path}: permission denied")
        self._cwd = target
        return target

    async def execute(self, command: str, timeout_seconds: float, user: str | None = None) -> Execution:
        """Run a command to its end, and keep where it left the shell.

        As another user it starts in the terminal's directory with its variables, and changes neither.

        Raises:
            Problem: The shell could not be started, or there is no such user.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._prepared(command) as (words, descriptors, env):
            done = await execute(
                self._context,
                words,
                cwd=self.cwd,
                env=env,
                timeout_seconds=timeout_seconds,
                output_limit=OUTPUT_BYTES,
                budget=ANSWER_BYTES,
                pass_fds=descriptors,
                user=self._context.user_named(user),
            )
            if user is None:
                self._remember_state(descriptors[2])
        succeeded = done.exit_code == 0 and not done.timed_out
        self.history.append(Remembered(now, command, succeeded, done.exit_code))
        return done

    def start_job(self, command: str, *, stdin: bool, timeout_seconds: float | None) -> Job:
        """Start a command in the background, in this terminal's directory and with its variables.

        Raises:
            Problem: It could not be started.
        """
        with self._prepared(command) as (words, descriptors, env):
            return self._context.jobs.start(
                words,
                cwd=self.cwd,
                env=env,
                stdin=stdin,
                timeout_seconds=timeout_seconds,
                shown=command,
                pass_fds=descriptors,
                user=self._context.user_named(None),
            )

    @contextlib.contextmanager
    def _prepared(self, command: str) -> Generator[tuple[list[str], list[int], dict[str, str]]]:
        """Yield the words of a shell that runs `command`, the descriptors that it inherits, and its environment."""
        if "\0" in command:
            raise Problem("bad_request", "a command cannot hold a NUL character")
        raw = command.encode("utf-8", "surrogateescape")
        descriptors: list[int] = []
        try:
            state = (self._variables or "").encode("utf-8", "surrogateescape")
            for content in (raw, state, b""):  # one by one, so that a failure leaves none open
                descriptors.append(_memory_file(content))  # noqa: PERF401
            words = ["bash", "-c", _SHELL, "bash", *map(str, descriptors)]
            if (shell := shell_of(self._context.environment.variables())) != "bash":
                words = [shell, "-c", command]  # without bash nothing lasts from one command to the next
            # Once there is a state it holds all variables; what was unset since must not come back.
            env = self._context.environment.variables() if self._variables is None else {}
            yield words, descriptors, env
        except OSError as exc:
            raise from_os_error(exc, "bash") from exc
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _remember_state(self, descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
            records = file.read(8 * 1024 * 1024).decode("utf-8", "surrogateescape").split("\0")
        # Records are pairs; a shell that was killed while it wrote leaves the last one without its end.
        for cwd, variables in zip(records[-3::-2], records[-2::-2], strict=False):
            if variables.endswith(END) and cwd.startswith("/"):
                self._variables = variables.removesuffix(END)
                self._cwd = Path(cwd.removesuffix("\n"))
                return


def _memory_file(content: bytes) -> int:
    low = os.memfd_create("ash", os.MFD_CLOEXEC)
    try:
        descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _LOW_DESCRIPTOR)
    finally:
        os.close(low)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
