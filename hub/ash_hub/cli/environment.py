"""Settings of a hive from options and the environment; what is wrong is a usage error that names the variable."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from ash_hub.settings import HubSettings
from ash_mcp.errors import ConfigError

if TYPE_CHECKING:
    from ash_hub.backends.local.settings import LocalSettings

__all__ = ["local_settings", "read_settings"]

PREFIX: Final = "ASH_HUB_"
_NESTED: Final = "__"


def read_settings(options: Mapping[str, Any], *, unsafe: bool = False) -> HubSettings:
    """Return the settings: `options` by setting name where they are not None, then `ASH_HUB_*`, then the defaults."""
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_unknown(os.environ)
    try:
        settings = HubSettings(**given)
    except SettingsError as exc:
        raise typer.BadParameter(_explain_unreadable(str(exc))) from exc
    except ValidationError as exc:
        raise typer.BadParameter("; ".join(_explain(exc, given))) from exc
    backend = {"kind": "local", **settings.backend}
    if unsafe:
        if backend["kind"] != "local":
            raise typer.BadParameter(f"--unsafe is for the local backend; {backend['kind']} isolates in its own way")
        backend["unsafe"] = True
    return settings.model_copy(update={"backend": backend})


def local_settings(settings: HubSettings) -> LocalSettings:
    """Return the settings of the local backend; what is wrong with them is a usage error."""
    from ash_hub.backends.local.settings import LocalSettings
    from ash_hub.chosen_backend import explained

    places = {"state_dir": settings.state_dir, "run_dir": settings.run_dir, "log_dir": settings.logs}
    try:
        with explained("local"):
            return LocalSettings.model_validate({**settings.backend, **places})
    except ConfigError as error:
        raise typer.BadParameter(error.message) from error


def _refuse_unknown(environ: Iterable[str]) -> None:
    """Refuse a variable that looks like a setting and is none: a typing error would go unseen."""
    known = {f"{PREFIX}{name.upper()}" for name in HubSettings.model_fields}
    for name in sorted(environ):
        upper = name.upper()
        if upper.startswith(PREFIX) and f"{PREFIX}{upper.removeprefix(PREFIX).partition(_NESTED)[0]}" not in known:
            close = difflib.get_close_matches(upper, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known))}"
            raise typer.BadParameter(f"{name} in the environment is no setting of a hive; {hint}")


def _explain(error: ValidationError, given: Mapping[str, Any]) -> Iterable[str]:
    for problem in error.errors(include_url=False, include_input=True)[:5]:
        parts = [str(part) for part in problem["loc"]]
        name = f"--{parts[0]}" if parts and parts[0] in given else PREFIX + _NESTED.join(parts).upper()
        yield f"{name}: {problem['msg']} (given: {problem['input']!r:.60})"


def _explain_unreadable(message: str) -> str:
    match = re.search(r'field "(\w+)"', message)
    if match is None:
        return message
    name = f"{PREFIX}{match[1].upper()}"
    example = "'[\"/srv/recipes\"]'" if match[1] == "recipe_dirs" else '\'["a", "b"]\' or \'{"key": "value"}\''
    return f"{name} in the environment must be JSON, such as {name}={example}"
