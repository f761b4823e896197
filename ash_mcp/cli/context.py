"""The context of every `ash` command: shared options, the connection, error messages, exit codes."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, cast, get_type_hints

import typer

from ash_mcp.cli.output import complain, emit_json, note
from ash_mcp.errors import AshError, ConfigError
from ash_mcp.wire import failure_to_json

if TYPE_CHECKING:
    from ash_mcp.client import Hive
    from ash_mcp.sandbox import Sandbox

__all__ = ["INTERRUPTED", "Cli", "SessionArgument", "fail", "hive_command", "leaf", "run_async"]

INTERRUPTED: Final = 130

SessionArgument = Annotated[str, typer.Argument(metavar="SESSION", help="Session name or id of a sandbox.")]

_URL = Annotated[str | None, typer.Option("--url", envvar="ASH_URL", help="The hive; else the one that you run here.")]
_SCOPE = Annotated[
    str | None, typer.Option("--scope", envvar="ASH_SCOPE", help="Part of the hive to work in; * shows all.")
]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else; failures too, on stderr.")]


@dataclass(frozen=True, slots=True)
class Cli:
    """The shared options of one run of a command."""

    url: str | None
    scope: str | None
    as_json: bool

    @asynccontextmanager
    async def hive(self) -> AsyncGenerator[Hive]:
        """Connect to the hive that was named."""
        from ash_mcp.client import Hive

        try:
            hive = Hive(self.url, scope=self.scope)
        except ConfigError as exc:
            raise typer.BadParameter(exc.message) from exc
        async with hive:
            yield hive

    @asynccontextmanager
    async def sandbox(self, session: str) -> AsyncGenerator[Sandbox]:
        """Connect to a sandbox that lives."""
        async with self.hive() as hive:
            yield await hive.attach(session)

    def tell(self, data: Any, *lines: str) -> None:
        """Print the answer: `data` with `--json`, else the lines."""
        if self.as_json:
            emit_json(data)
        else:
            for line in lines:
                print(line)

    def note(self, line: str) -> None:
        """Print a message on standard error, unless `--json` was given."""
        if not self.as_json:
            note(line)


def hive_command(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a command of an async function whose first argument is a `Cli`.

    Adds `--url`, `--scope` and, where the command has no `--json` of its own, `--json`.
    """
    hints = get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in list(inspect.signature(function).parameters.values())[1:]
    ]
    shared = {"url": (_URL, None), "scope": (_SCOPE, None), "as_json": (_JSON, False)}
    if "json_arguments" in hints:
        del shared["as_json"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in shared.items()
    ]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        cli = Cli(given.pop("url"), given.pop("scope"), given.pop("as_json", given.get("output") == "json"))
        run_async(functools.partial(function, cli, **given), as_json=cli.as_json)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    command.__signature__ = inspect.Signature([*parameters, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *added)}
    return command


def run_async(function: Callable[[], Awaitable[None]], *, as_json: bool = False, use_uvloop: bool = False) -> None:
    """Run an async command; a typed failure becomes one line on standard error and exit code 1."""
    import anyio

    try:
        anyio.run(function, backend_options={"use_uvloop": use_uvloop})
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as exc:
        error = leaf(exc)
        if isinstance(error, AshError):
            fail(error, as_json=as_json)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            named = f"{error.filename}: " if error.filename else ""
            fail(AshError(f"{named}{error.strerror or error}"), as_json=as_json)
        raise error from None if error is exc else exc


def leaf(error: BaseException) -> BaseException:
    """Return the error to show for an exception group: its first `AshError`, else its first exception."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [leaf(inner) for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions]
    return next((inner for inner in leaves if isinstance(inner, AshError)), leaves[0])


def fail(error: AshError, *, as_json: bool) -> None:
    """Print the error, as text or as JSON, and exit with code 1."""
    if as_json:
        note(json.dumps({"error": failure_to_json(error)}, ensure_ascii=False))
    else:
        complain(error.message)
    raise typer.Exit(1)
