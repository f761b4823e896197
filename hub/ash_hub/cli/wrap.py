"""`ash wrap`: an MCP server of anybody's, behind walls."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ash_hub.wrap.server_json import PublishedServer

__all__ = ["app"]

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


# What follows the first word is the server's own, options too.
@app.command(context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False})
def wrap(
    words: Annotated[list[str] | None, typer.Argument(help="The server's command line, after --.")] = None,
    folder: Annotated[
        list[str] | None, typer.Option(help="A folder or file it sees, read-only; PATH:rw: it may write there.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="A variable it gets: NAME, with the value here, or NAME=VALUE.")
    ] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="What it may reach: none (if not said), internet, or domains.")
    ] = None,
    memory: Annotated[str, typer.Option(help="What it may take, with the files it writes inside.")] = "2Gi",
    refresh: Annotated[bool, typer.Option(help="Install its package (npx, uvx) anew.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="A host's file of MCP servers; prints the one that replaces it.")
    ] = None,
    server: Annotated[Path | None, typer.Option(help="A server.json of MCP's registry, instead of words.")] = None,
    given: Annotated[
        list[str] | None, typer.Option("--set", help="With --server: NAME=VALUE of what it asks its user.")
    ] = None,
    recipe: Annotated[bool, typer.Option(help="With --server: prints a recipe of it, for a hive.")] = False,
) -> None:
    """Run an MCP server on stdin and stdout, in a sandbox of its own.

    It sees none of your files but those you name, no variable but those you name, and no network unless you say so.
    No hive is needed, and nothing is left when it ends. docs/wrap.md has examples.
    """
    from ash_mcp.errors import ConfigError

    try:
        if config is not None:
            if words:
                raise ConfigError("name a server or --config, not both")
            _print_replacement(config)
            return
        folders, variables = list(folder or ()), list(env or ())
        if server is not None:
            published = _published(server, given or [])
            if recipe:
                _print_recipe(published)
                return
            words = [*published.words(), *(words or ())]
            folders = [*published.paths(), *folders]
            variables = [*_variables(published, variables), *variables]
        if not words:
            raise ConfigError("name the server's command line: ash wrap -- npx -y some-server")
        code = _run(words, folders, variables, network or [], memory, refresh=refresh)
    except ConfigError as error:
        _say(error.message)
        raise typer.Exit(127 if type(error).__name__ == "ProgramMissing" else 2) from error
    sys.stderr.flush()
    os._exit(code)  # a thread may still wait for the host's next byte


def _run(
    words: list[str], folders: list[str], variables: list[str], network: list[str], memory: str, *, refresh: bool
) -> int:
    from ash_hub.wrap.request import LEAST_MEMORY, WrapRequest, environment_of, folder_of, network_of
    from ash_hub.wrap.wrapped import run_wrapped
    from ash_mcp.errors import ConfigError
    from ash_mcp.quantities import memory_quantity

    memory_bytes = memory_quantity(memory)
    if memory_bytes < LEAST_MEMORY:
        raise ConfigError(f"--memory: {memory} is too little to start a server in; say 64Mi at least")
    request = WrapRequest(
        words=tuple(words),
        folders=tuple(folder_of(text) for text in folders),
        environment=environment_of(variables, os.environ),
        network=network_of(network),
        memory_bytes=memory_bytes,
        refresh=refresh,
    )
    return run_wrapped(request, _say)


def _print_replacement(path: Path) -> None:
    from ash_hub.wrap.servers_file import replacement

    own = os.path.abspath(sys.argv[0])  # since hosts of a desktop have another PATH
    text, notes = replacement(_text_of(path), own if os.path.basename(own) == "ash" else "ash")
    for note in notes:
        _say(note)
    sys.stdout.write(text)


def _published(path: Path, given: list[str]) -> PublishedServer:
    from ash_hub.wrap.server_json import PublishedServer
    from ash_mcp.errors import ConfigError

    values = dict[str, str]()
    for text in given:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set: {text!r} is no NAME=VALUE")
        values[name] = value
    return PublishedServer.read(_text_of(path), values)


def _variables(published: PublishedServer, named: list[str]) -> list[str]:
    """Return what `--env` would say for the variables of a published server that have a value of its own.

    Those set here are given to it only where they are named: whoever wrote the entry could name any secret.
    """
    from ash_mcp.errors import ConfigError

    here = {text.partition("=")[0] for text in named}
    found: list[str] = []
    for name, value in published.variables().items():
        if name in here:
            continue
        if value is not None:
            found.append(f"{name}={value}")
        elif name in published.required():
            raise ConfigError(f"the server needs the variable {name}: say --env {name}, and set it here")
        if name in os.environ:
            _say(f"{name} is set here and not given to the server; say --env {name} if it is to have it")
    return found


def _print_recipe(published: PublishedServer) -> None:
    from ash_hub.wrap.server_json import recipe_toml

    for name in published.required():
        if published.variables()[name] is None:
            _say(f"a spawn of it has to bring the secret or variable {name}")
    sys.stdout.write(recipe_toml(published.recipe()))


def _text_of(path: Path) -> str:
    from ash_mcp.errors import ConfigError

    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _say(sentence: str) -> None:
    sys.stderr.write(f"ash wrap: {sentence}\n")
    sys.stderr.flush()
