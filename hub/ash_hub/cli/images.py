"""`ash image import|pull|list|remove`: the images that sandboxes of this machine can be started from."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ash_mcp.cli.context import fail
from ash_mcp.cli.output import clean, emit_json, new_console, note, say
from ash_mcp.errors import AshError, ConfigError

if TYPE_CHECKING:
    from ash_hub.backends.local.settings import LocalSettings
    from ash_hub.images import Image

__all__ = ["image"]

image = typer.Typer(
    help="Keep images on this machine, for `spawn --image`.\n\n"
    "They are kept for all hives of this user, in the directory that ASH_HUB_BACKEND__IMAGE_DIR names.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else; failures too, on stderr.")]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="As python:3.12-slim or registry.example/team/tool:1.")]


@image.command("import")
def import_image(
    source: Annotated[
        Path, typer.Argument(metavar="ARCHIVE", help="Of `docker save`, an OCI archive, or the folder of a layout.")
    ],
    name: _Name,
    as_json: _Json = False,
) -> None:
    """Keep the image of an archive or layout under a name."""
    try:
        from ash_hub.backends.local.local_images import build_bundle, image_store
        from ash_hub.images.archives import open_parts

        settings = _settings()
        found = image_store(settings).add(name, open_parts(source), said=_saying(as_json))
        build_bundle(settings)  # so that the first spawn need not
    except AshError as error:
        fail(error, as_json=as_json)
        raise
    _tell(found, as_json)


@image.command()
def pull(
    name: _Name,
    insecure: Annotated[bool, typer.Option("--insecure", help="The registry may be without TLS.")] = False,
    as_json: _Json = False,
) -> None:
    """Fetch an image from its registry, by skopeo, with the credentials of `skopeo login` or `docker login`."""
    try:
        from ash_hub.backends.local.local_images import build_bundle, image_store
        from ash_hub.images.pull import pull as fetch

        settings = _settings()
        store, most = image_store(settings), settings.image_bytes
        found = fetch(store, name, most_bytes=most, insecure=insecure, said=_saying(as_json))
        build_bundle(settings)
    except AshError as error:
        fail(error, as_json=as_json)
        raise
    _tell(found, as_json)


@image.command("list")
def list_images(as_json: _Json = False) -> None:
    """Show the images of this machine."""
    try:
        from ash_hub.backends.local.local_images import image_store

        found = image_store(_settings()).list()
    except AshError as error:
        fail(error, as_json=as_json)
        raise
    if as_json:
        emit_json({"images": [_shape(each) for each in found]})
    elif found:
        from rich.table import Table

        table = Table("name", "id", "size", "from", "since", box=None)
        for each in found:
            since = datetime.datetime.fromtimestamp(each.created_at).strftime("%Y-%m-%d %H:%M")
            size = f"{each.bytes >> 20} MiB"
            table.add_row(clean(each.short_name), each.id.removeprefix("sha256:")[:12], size, each.origin, since)
        new_console().print(table)
    else:
        note("No images. `ash image import` or `ash image pull` brings one.")


@image.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As `ash image list` shows them.")],
    as_json: _Json = False,
) -> None:
    """Remove images; layers that a sandbox still uses go later."""
    removed: list[str] = []
    try:
        from ash_hub.backends.local.local_images import image_store

        store = image_store(_settings())
        for name in names:
            if not store.remove(name):
                raise ConfigError(f"there is no image {name!r}; `ash image list` shows those that there are")
            removed.append(name)
    except AshError as error:
        fail(error, as_json=as_json)
        raise
    finally:
        if as_json and removed:
            emit_json({"removed": removed})
        elif not as_json:
            for name in removed:
                say(f"Removed {clean(name)}.")


def _settings() -> LocalSettings:
    from ash_hub.cli.environment import local_settings, read_settings

    found = read_settings({})
    if found.backend["kind"] != "local":
        raise ConfigError(f"the backend {found.backend['kind']} keeps no images here: its nodes fetch them")
    return local_settings(found)


def _saying(as_json: bool) -> Callable[[str], None]:
    def nothing(line: str) -> None:
        del line

    return nothing if as_json else note


def _tell(found: Image, as_json: bool) -> None:
    if as_json:
        emit_json(_shape(found))
        return
    say(f"{clean(found.short_name)} is here: {found.bytes >> 20} MiB in {len(found.layers)} layers.")
    for what, count in sorted(found.left_out.items()):
        note(f"Left out of {count} files: {what}.")


def _shape(found: Image) -> dict[str, Any]:
    return {
        "name": found.short_name,
        "id": found.id,
        "bytes": found.bytes,
        "layers": len(found.layers),
        "origin": found.origin,
        "created_at": datetime.datetime.fromtimestamp(found.created_at, datetime.UTC).isoformat(),
        "left_out": dict(found.left_out),
        "config": found.config.to_json(),
    }
