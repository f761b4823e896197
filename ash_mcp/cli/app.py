"""The `ash` command line: its commands, and those of other packages. A command imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Final

import typer

from ash_mcp import __version__
from ash_mcp.cli import calling, copying, hosts, lifecycle, listing, running, shell, snapshots, spawning
from ash_mcp.cli.context import INTERRUPTED, hive_command
from ash_mcp.cli.output import complain, say

__all__ = ["new_app", "run"]

COMMANDS_GROUP: Final = "ash.commands"
"""Entry points of commands that need more than this package: functions that typer understands, or typer apps."""

_CONTEXT: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"]}
_PASS_THROUGH: Final[dict[str, Any]] = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""All words, --help too, go to the command that the entry point names."""

_HUB_COMMANDS: Final = {
    "up": "Run a hive here; --stdio speaks MCP on stdin and stdout.",
    "router": "Route calls for hives that share a Redis.",
    "wrap": "Run any MCP server on stdin and stdout, in a sandbox of its own.",
    "doctor": "Say what isolation this machine gives and what it lacks.",
    "key": "Make, list and revoke API keys of the hive here.",
    "egress": "Run an egress proxy by itself, as in a pod.",
    "bench": "Measure spawns and calls in this hive.",
}
"""The help line of our own; that of another package's command names its module."""

_OUR_PACKAGES: Final = frozenset({"ash_mcp", "ash_hub", "ash_router"})


def run(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and leave the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        new_app(words)(args=words, prog_name="ash")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has left; what is still buffered must not raise once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def new_app(words: Sequence[str]) -> typer.Typer:
    """Return all commands; those of other packages are looked for only where `words` may mean one."""
    app = typer.Typer(
        help="Isolated sandboxes for agents, from a hive that speaks MCP.",
        epilog="`ash COMMAND --help` says more. Exit codes: 0, 1 failed, 2 usage; exec gives the command's own.",
        context_settings=_CONTEXT,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
    )
    app.callback()(_shared_options)
    _add_hub_command(app, "up")
    for name, function in (
        ("spawn", spawning.spawn),
        ("list", listing.list_sandboxes),
        ("tools", calling.tools),
        ("call", calling.call),
        ("exec", running.exec_command),
        ("shell", shell.shell),
        ("cp", copying.copy),
        ("logs", lifecycle.logs),
        ("extend", lifecycle.extend),
        ("network", lifecycle.network),
        ("reset", snapshots.reset),
        ("fork", snapshots.fork),
    ):
        app.command(name)(hive_command(function))
    _add_plugin(app, "snapshot", "Keep a sandbox's files, to go back to or to start from.", lambda: snapshots.snapshot)
    _add_plugin(app, "share", "Hand a sandbox to another agent, and take it back.", _load_share)
    app.command("destroy")(hive_command(lifecycle.destroy))
    _add_hub_command(app, "router")
    _add_hub_command(app, "wrap")
    _add_hub_command(app, "doctor")
    _add_hub_command(app, "key")
    app.command("config")(hive_command(hosts.config))
    known = {command.name for command in app.registered_commands}
    if not known.intersection(words):
        for point in _installed():
            if point.name not in known:
                summary = _HUB_COMMANDS.get(point.name, f"From {point.value.partition(':')[0]}.")
                _add_plugin(app, point.name, summary, point.load)
    return app


def _load_share() -> typer.Typer:
    from ash_mcp.cli.sharing import share

    return share


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"ash {__version__}")
        raise typer.Exit


def _shared_options(
    url: Annotated[str | None, typer.Option(help="The hive, for any command; else ASH_URL.")] = None,
    scope: Annotated[str | None, typer.Option(help="Part of the hive, for any command; else ASH_SCOPE.")] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del version
    # Commands read these variables where they are not told otherwise, those of other packages too.
    os.environ.update({name: value for name, value in (("ASH_URL", url), ("ASH_SCOPE", scope)) if value is not None})


def _installed() -> Sequence[EntryPoint]:
    from importlib.metadata import entry_points

    return sorted(entry_points(group=COMMANDS_GROUP), key=lambda point: point.name)


def _add_hub_command(app: typer.Typer, name: str) -> None:
    def load() -> Callable[..., Any]:
        for point in _installed():
            if point.name == name:
                return point.load()
        raise ModuleNotFoundError(name="ash_hub")

    _add_plugin(app, name, _HUB_COMMANDS[name], load)


def _add_plugin(app: typer.Typer, name: str, summary: str, load: Callable[[], Callable[..., Any]]) -> None:
    def command(context: typer.Context) -> None:
        try:
            loaded = load()
            inner = loaded if isinstance(loaded, typer.Typer) else _single(loaded)
            inner(args=context.args, prog_name=f"ash {name}")
        except ModuleNotFoundError as exc:
            if (exc.name or "").partition(".")[0] in _OUR_PACKAGES and exc.name != "ash_hub":
                raise  # a defect of ours: no package brings it
            complain(f"`ash {name}` needs a part that is not installed ({exc.name}); run: pip install 'ash-mcp[all]'")
            raise typer.Exit(1) from exc

    app.command(name, help=summary, context_settings=_PASS_THROUGH)(command)


def _single(function: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer(
        context_settings=_CONTEXT, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
    )
    app.command()(function)
    return app
