"""`ash doctor`: what this machine or cluster gives a hive, what it lacks, what to do about it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ash_mcp.cli.context import run_async
from ash_mcp.cli.output import emit_json, say

if TYPE_CHECKING:
    from ash_hub.backends.checks import Check
    from ash_hub.settings import HubSettings

__all__ = ["doctor"]

_SENTENCES: Final = {
    "local": (
        "Sandboxes can be isolated here. `ash up` starts a hive.",
        "Sandboxes cannot be isolated here",
    ),
    "kubernetes": (
        "Sandboxes can be made in this cluster. The chart helm/ash, or `ash up --backend kubernetes`, starts a hive.",
        "Sandboxes cannot be made in this cluster",
    ),
}
"""What is said in the end: that all is well, or before what is missing."""


def doctor(
    backend: Annotated[
        str | None, typer.Option(help="Where sandboxes are to be made.  [as the settings say, else local]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Look at what a hive finds here: isolation and limits of this machine, or its cluster; the port, other hives.

    On this machine a trial sandbox is started; in a cluster nothing is made. The exit code is 1 when something is
    missing without which no sandbox can be isolated, or made.
    """
    from ash_hub.cli.environment import read_settings

    settings = read_settings({"backend": {"kind": backend} if backend is not None else None})
    kind = settings.backend["kind"]
    if kind == "local":
        checks = [*_this_machine(settings), *_launchers(settings)]
    elif kind == "kubernetes":
        checks = _cluster(settings, as_json=as_json)
    else:
        raise typer.BadParameter(f"the doctor knows the backends local and kubernetes, and nothing of {kind!r}")
    checks += _surroundings(settings)
    lacking = [check for check in checks if check.required and not check.ok]
    if as_json:
        emit_json({"ok": not lacking, "checks": [asdict(check) for check in checks]})
    else:
        _tell(checks, lacking, _SENTENCES[kind])
    raise typer.Exit(1 if lacking else 0)


def _this_machine(settings: HubSettings) -> list[Check]:
    from ash_hub.backends.local.host import probe
    from ash_hub.backends.local.local_images import image_check
    from ash_hub.cli.environment import local_settings

    chosen = local_settings(settings)
    checks = probe(chosen)
    has_machines = any(check.name == "users of sandboxes" and check.ok for check in checks)
    return [*checks, image_check(chosen, has_machines=has_machines)]


def _launchers(settings: HubSettings) -> list[Check]:
    """Say which launcher starts sandboxes, and why."""
    from ash_hub.backends.checks import Check
    from ash_hub.backends.local.fork_trial import try_to_fork
    from ash_hub.backends.local.host import host_facts, isolation_works
    from ash_hub.backends.local.runtime import find_runtime
    from ash_hub.backends.local.settings import LocalSettings

    chosen = settings.backend.get("launcher", LocalSettings.model_fields["launcher"].default)
    if chosen == "bubblewrap":
        return [Check("launcher", True, "bubblewrap for every sandbox, as ASH_HUB_BACKEND__LAUNCHER says")]
    facts = host_facts()
    if isolation_works(facts) is not None:
        return []  # said already, with what to do
    problem = try_to_fork(facts, find_runtime())
    if problem is None:
        way = "sandboxes of an installed recipe are forked from a process that has it loaded; bubblewrap starts others"
        return [Check("launcher", True, f"{chosen}: {way}")]
    lost = "every sandbox is started by bubblewrap" if chosen == "auto" else "no sandbox of an installed recipe starts"
    fix = "set ASH_HUB_BACKEND__LAUNCHER=bubblewrap" if chosen == "fork" else "nothing is lost but speed and memory"
    return [Check("launcher", False, f"{chosen}, but {lost}: {problem}", fix)]


def _cluster(settings: HubSettings, *, as_json: bool) -> list[Check]:
    from ash_hub.backends.kubernetes import KubernetesSettings, check
    from ash_hub.chosen_backend import explained
    from ash_mcp.errors import ConfigError

    try:
        with explained("kubernetes"):
            chosen = KubernetesSettings.model_validate(settings.backend)
    except ConfigError as error:
        raise typer.BadParameter(error.message) from error
    found: list[Check] = []

    async def look() -> None:
        with explained("kubernetes"):
            found.extend(await check(chosen))

    run_async(look, as_json=as_json)
    return found


def _tell(checks: Sequence[Check], lacking: Sequence[Check], sentences: tuple[str, str]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok     " if check.ok else "MISSING" if check.required else "limited"
        say(f"{mark}  {check.name:<{width}}  {check.detail}")
        if not check.ok and check.fix:
            say(f"{'':9}{'':<{width}}  -> {check.fix}")
    say("")
    good, bad = sentences
    say(f"{bad}: {', '.join(check.name for check in lacking)} is missing." if lacking else good)


def _surroundings(settings: HubSettings) -> list[Check]:
    from ash_hub.backends.checks import Check

    url = _running_hive()
    hive = Check("hive", True, f"one of yours runs at {url}" if url else "none of yours runs")
    free = _is_free(settings.host, settings.port)
    detail = f"{settings.host}:{settings.port} is {'free' if free else 'taken'}"
    ours = url is not None and f":{settings.port}/" in url
    port = Check("port", free or ours, detail, "use `ash up --port 0` or ASH_HUB_PORT")
    return [hive, port, _other_users(settings), *(_directory(name, path) for name, path in _directories(settings))]


def _other_users(settings: HubSettings) -> Check:
    from ash_hub.backends.checks import Check
    from ash_hub.serving.auth import is_loopback, peer_problem

    name = "other users"
    if not is_loopback(settings.host):
        return Check(name, True, "need an API key or a token, as everybody does")
    if not settings.auth.peer_check:
        return Check(name, False, "may use the hive", "leave ASH_HUB_AUTH__PEER_CHECK out")
    problem = peer_problem()
    if problem is None:
        return Check(name, True, "of this machine are kept out of the hive")
    return Check(
        name, False, f"cannot be told from you ({problem}) and may use the hive", "keep them off this machine"
    )


def _running_hive() -> str | None:
    from ash_mcp.bridge.background import UserHive

    found: list[str | None] = []

    async def look() -> None:
        found.append(await UserHive().find())

    run_async(look)
    return found[0]


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _directories(settings: HubSettings) -> Sequence[tuple[str, os.PathLike[str]]]:
    return (("state directory", settings.state_dir), ("run directory", settings.run_dir))


def _directory(name: str, path: os.PathLike[str]) -> Check:
    """Say whether a directory can be used, without making it."""
    from ash_hub.backends.checks import Check

    existing = os.path.abspath(path)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    usable = os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)
    detail = f"{os.fspath(path)}{'' if usable else ' cannot be written'}"
    variable = f"ASH_HUB_{name.replace(' ', '_').upper()}".replace("DIRECTORY", "DIR")
    return Check(name, usable, detail, f"choose another with {variable}", required=True)
