"""`ash key new|list|revoke`: the API keys of a hive, in its state directory or where its backend keeps them."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ash_mcp.cli.context import fail, run_async
from ash_mcp.cli.output import clean, emit_json, new_console, note, say
from ash_mcp.errors import AshError, ConfigError
from ash_mcp.types import PrincipalLimits

if TYPE_CHECKING:
    from ash_hub.backends.documents import Documents
    from ash_router.admission.api_keys import ApiKey, KeyChange, KeyFile

__all__ = ["key"]

key = typer.Typer(
    help="Make, list and revoke API keys of a hive.\n\n"
    "The hive is the one of this environment: of its ASH_HUB_STATE_DIR or, where the backend keeps the keys, of its "
    "ASH_HUB_BACKEND__… settings. A running one follows within seconds.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else; failures too, on stderr.")]


def _most(what: str) -> Any:
    return typer.Option(metavar="N", min=0, help=f"At most. {what}")


def _asked(what: str, words: str) -> Any:
    return typer.Option(metavar=what, help=f"{words} May be said several times.")


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
    max_sandboxes: Annotated[int | None, _most("Living sandboxes of its owner.")] = None,
    max_starting: Annotated[int | None, _most("Spawns of its owner that are not ready yet.")] = None,
    max_waiting: Annotated[int | None, _most("Spawns of its owner that wait for a start.")] = None,
    max_calls: Annotated[int | None, _most("Calls of its owner in flight.")] = None,
    max_streams: Annotated[int | None, _most("Open streams of its owner that only listen.")] = None,
    max_sessions: Annotated[int | None, _most("MCP sessions of its owner.")] = None,
    max_backchannels: Annotated[int | None, _most("Such sessions on sandboxes that may ask something.")] = None,
    max_runs: Annotated[int | None, _most("Open runs of its owner.")] = None,
    image: Annotated[list[str] | None, _asked("PATTERN", "Spawns may name only such images.")] = None,
    runtime_class: Annotated[list[str] | None, _asked("NAME", "Only such runtime classes.")] = None,
    node_selector: Annotated[list[str] | None, _asked("LABEL=PATTERN", "Only such nodes.")] = None,
    cpu: Annotated[str | None, typer.Option(metavar="2", help="At most so many processors.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="4Gi", help="At most so much memory.")] = None,
    network: Annotated[
        list[str] | None, _asked("DOMAIN", "Its sandboxes reach only such domains; 'none' for nothing.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Make a key and print it, once: only its hash is kept.

    Its limits and what its spawns may ask for narrow what the hive allows, and never widen it. They are checked
    against all that the key's owner has, by whichever key.
    """
    from ash_mcp.cli.values import read_duration
    from ash_router.admission.api_keys import add_key

    seconds = read_duration(expires) if expires is not None else None
    limits = PrincipalLimits(
        sandboxes=max_sandboxes,
        starting=max_starting,
        waiting=max_waiting,
        calls=max_calls,
        streams=max_streams,
        sessions=max_sessions,
        backchannels=max_backchannels,
        runs=max_runs,
    )
    asked = {
        "images": image,
        "runtime_classes": runtime_class,
        "node_selectors": None if node_selector is None else _by_label(node_selector),
        "cpu": cpu,
        "memory": memory,
        "network": network[0] if network in (["none"], ["internet"]) else network,
    }
    made, text = _change(
        lambda keys: add_key(
            keys,
            now=time.time(),
            name=name,
            subject=subject,
            scopes=scope or (),
            ttl_seconds=seconds,
            limits=limits,
            spawn_policy=_policy({name: value for name, value in asked.items() if value is not None}),
        ),
        as_json,
    )
    if as_json:
        emit_json({**_shape(made), "key": text})
        return
    say(text)
    note(f"Key {made.id} of {clean(made.subject)}. It is not shown again; give it to clients as ASH_TOKEN.")


@key.command("list")
def list_keys(as_json: _Json = False) -> None:
    """Show the keys, never what is secret in them."""
    from ash_hub.backends.kept_keys import read_api_keys

    keys = _work(lambda file: file.read(), read_api_keys, as_json)
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
    from ash_router.admission.api_keys import revoke_keys

    gone = _change(lambda known: revoke_keys(known, keys), as_json)
    if as_json:
        emit_json({"revoked": [_shape(known) for known in gone]})
    else:
        for known in gone:
            say(f"Revoked {known.id}{f' ({clean(known.name)})' if known.name else ''}.")


def _change(change: KeyChange[T], as_json: bool) -> T:
    from ash_hub.backends.kept_keys import change_api_keys

    return _work(lambda file: file.change(change), lambda documents: change_api_keys(documents, change), as_json)


def _work(in_file: Callable[[KeyFile], T], in_documents: Callable[[Documents], Awaitable[T]], as_json: bool) -> T:
    """Do something with the keys where the hive of this environment has them, and return what comes of it."""
    from ash_hub.cli.environment import read_settings
    from ash_hub.serving.auth import key_file

    settings = read_settings({})
    done: list[T] = []

    async def work() -> None:
        from ash_hub.chosen_backend import open_documents

        async with open_documents(settings) as documents:
            done.append(await in_documents(documents))

    if settings.backend["kind"] != "local":
        run_async(work, as_json=as_json)
        return done[0]
    try:
        return in_file(key_file(settings.state_dir))
    except AshError as error:
        fail(error, as_json=as_json)
        raise


def _shape(known: ApiKey) -> dict[str, Any]:
    return {
        "id": known.id,
        "name": known.name,
        "subject": known.subject,
        "scopes": None if known.scopes is None else list(known.scopes),
        "limits": _limits(known),
        "spawn": json.loads(known.spawn_policy or "{}"),
        "created_at": _stamp(known.created_at),
        "expires_at": None if known.expires_at is None else _stamp(known.expires_at),
        "expired": known.expired(time.time()),
    }


def _limits(known: ApiKey) -> dict[str, int]:
    return {name: most for name, most in asdict(known.limits).items() if most is not None}


def _limits_said(known: ApiKey) -> str:
    """Return a key's limits and what its spawns may ask for, for people."""
    asked: dict[str, Any] = json.loads(known.spawn_policy or "{}")
    limits = [f"{name} {most}" for name, most in _limits(known).items()]
    limits += [f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in asked.items()]
    return ", ".join(limits) or "the hive's"


def _by_label(selectors: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for selector in selectors:
        label, _, pattern = selector.partition("=")
        found.setdefault(label, []).append(pattern or "*")
    return found


def _policy(asked: dict[str, Any]) -> str:
    """Return what a key's spawns may ask for, as the key keeps it.

    Raises:
        ConfigError: It cannot be used; the message says what.
    """
    from pydantic import ValidationError

    from ash_hub.settings import SpawnLimits

    try:
        return SpawnLimits.model_validate(asked).model_dump_json(exclude_unset=True) if asked else ""
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from exc


def _stamp(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _table(keys: Sequence[ApiKey]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ash_mcp.cli.tables import moment

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ID", "NAME", "SUBJECT", "SCOPES", "LIMITS", "CREATED", "EXPIRES"):
        table.add_column(column, overflow="fold", no_wrap=column == "ID")
    now = time.time()
    for known in keys:
        expires = "never" if known.expires_at is None else moment(known.expires_at)
        cells = [known.id, known.name, known.subject, "all" if known.scopes is None else ", ".join(known.scopes)]
        cells += [_limits_said(known), moment(known.created_at)]
        cells.append(f"{expires} (expired)" if known.expired(now) else expires)
        table.add_row(*(Text(clean(cell)) for cell in cells))
    return table
