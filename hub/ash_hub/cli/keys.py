"""`ash key new|list|revoke`: the API keys of the hive of this machine, in its state directory."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ash_mcp.cli.context import fail
from ash_mcp.cli.output import clean, emit_json, new_console, note, say
from ash_mcp.errors import AshError

if TYPE_CHECKING:
    from ash_router.keys import ApiKey, KeyFile

__all__ = ["key"]

key = typer.Typer(
    help="Make, list and revoke API keys of the hive of this machine.\n\n"
    "The hive is the one with this environment's ASH_HUB_STATE_DIR. A running one follows within seconds.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else; failures too, on stderr.")]


@key.command()
def new(
    name: Annotated[str, typer.Option(help="What you call it, to find it again.")] = "",
    subject: Annotated[
        str | None,
        typer.Option(help="Whose it is: keys of one subject share sandboxes. An owner of its own if absent."),
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(metavar="S", help="Bind it to this scope; may be said several times.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="30d", help="How long it is good; for ever if absent.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from ash_mcp.cli.values import read_duration

    seconds = read_duration(expires) if expires is not None else None
    made, text = _with_file(
        lambda file: file.add(name=name, subject=subject, scopes=scope or (), ttl_seconds=seconds), as_json
    )
    if as_json:
        emit_json({**_shape(made), "key": text})
        return
    say(text)
    note(f"Key {made.id} of {clean(made.subject)}. It is not shown again; give it to clients as ASH_TOKEN.")


@key.command("list")
def list_keys(as_json: _Json = False) -> None:
    """Show the keys, never what is secret in them."""
    keys = _with_file(lambda file: file.read(), as_json)
    if as_json:
        emit_json({"keys": [_shape(known) for known in keys]})
    elif keys:
        new_console().print(_table(keys))
    else:
        note("No keys. `ash key new` makes one.")


@key.command()
def revoke(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Ids, or names that only one key has.")],
    as_json: _Json = False,
) -> None:
    """End keys: a running hive refuses them within seconds.

    Sandboxes of their owners live on until they expire.
    """
    gone = _with_file(lambda file: file.revoke(keys), as_json)
    if as_json:
        emit_json({"revoked": [_shape(known) for known in gone]})
    else:
        for known in gone:
            say(f"Revoked {known.id}{f' ({clean(known.name)})' if known.name else ''}.")


def _with_file(work: Callable[[KeyFile], T], as_json: bool) -> T:
    from ash_hub.auth import key_file
    from ash_hub.cli.environment import read_settings

    try:
        return work(key_file(read_settings({}).state_dir))
    except AshError as error:
        fail(error, as_json=as_json)
        raise


def _shape(known: ApiKey) -> dict[str, Any]:
    return {
        "id": known.id,
        "name": known.name,
        "subject": known.subject,
        "scopes": None if known.scopes is None else list(known.scopes),
        "created_at": _stamp(known.created_at),
        "expires_at": None if known.expires_at is None else _stamp(known.expires_at),
        "expired": known.expired(time.time()),
    }


def _stamp(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _table(keys: Sequence[ApiKey]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ash_mcp.cli.sheets import moment

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ID", "NAME", "SUBJECT", "SCOPES", "CREATED", "EXPIRES"):
        table.add_column(column, overflow="fold", no_wrap=column == "ID")
    now = time.time()
    for known in keys:
        expires = "never" if known.expires_at is None else moment(known.expires_at)
        cells = [known.id, known.name, known.subject, "all" if known.scopes is None else ", ".join(known.scopes)]
        cells += [moment(known.created_at), f"{expires} (expired)" if known.expired(now) else expires]
        table.add_row(*(Text(clean(cell)) for cell in cells))
    return table
