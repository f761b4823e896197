"""The arguments of the runner's own tools, checked, with errors that say what is accepted."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from ash_recipes.runner.problems import Problem

__all__ = ["check", "explain"]


def _bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be a string of base64")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as exc:
        raise ValueError(f"is not base64: {exc}") from exc


Base64 = Annotated[bytes, PlainValidator(_bytes)]
Text = Annotated[str, Field(strict=True)]
Command = (
    Annotated[str, Field(strict=True, min_length=1)] | Annotated[list[Text], Field(min_length=1, max_length=100_000)]
)
Seconds = Annotated[float, Field(gt=0, le=31_536_000, allow_inf_nan=False)]
Offset = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Key = Annotated[str, Field(strict=True, min_length=1, max_length=200)]


class Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Where(Arguments):
    """Where and as whom a command runs."""

    cwd: Text | None = None
    env: dict[str, Text] = {}
    key: Key | None = None
    user: Annotated[str, Field(strict=True, min_length=1, max_length=100)] | None = None


class Start(Where):
    command: Command


class Exec(Start):
    stdin_base64: Base64 | None = None
    timeout_seconds: Seconds | None = 60.0
    output_limit: Annotated[int, Field(ge=0, le=262_144, strict=True)] = 262_144


class ExecCancel(Arguments):
    key: Key


class JobStart(Start):
    stdin: Annotated[bool, Field(strict=True)] = False
    timeout_seconds: Seconds | None = None
    paced: Annotated[bool, Field(strict=True)] = False


class JobRead(Arguments):
    job: Text
    offset: Offset = 0
    limit: Annotated[int, Field(ge=1, le=524_288, strict=True)] = 262_144
    wait_seconds: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False)] = 0.0


class JobWrite(Arguments):
    job: Text
    data_base64: Base64 = b""
    eof: Annotated[bool, Field(strict=True)] = False


class JobSignal(Arguments):
    job: Text
    signal: Annotated[str, Field(min_length=1, max_length=20, coerce_numbers_to_str=True)] = "TERM"


Cells = Annotated[int, Field(ge=1, le=10_000, strict=True)]


class PtyStart(Where):
    command: Command | None = None
    rows: Cells = 24
    columns: Cells = 80
    detached_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 3600.0


class PtyAttach(Arguments):
    pty: Text
    offset: Offset | None = None
    rows: Cells | None = None
    columns: Cells | None = None


class PtyResize(Arguments):
    rows: Cells
    columns: Cells


class PtySignal(Arguments):
    signal: Annotated[str, Field(min_length=1, max_length=20, coerce_numbers_to_str=True)]


class Nothing(Arguments):
    pass


class FileRead(Arguments):
    path: Text
    offset: Offset = 0
    limit: Annotated[int, Field(ge=1, le=524_288, strict=True)] = 524_288


class FileWrite(Arguments):
    path: Text
    data_base64: Base64
    offset: Offset | None = None
    mode: Annotated[int, Field(ge=0, le=0o7777, strict=True)] | None = None
    key: Key | None = None
    end: Literal["commit", "abandon"] | None = None

    @model_validator(mode="after")
    def _needs_key(self) -> Self:
        if self.end is not None and self.key is None:
            raise ValueError("'end' is of a file with a key")
        return self


class FileList(Arguments):
    path: Text = "."
    cursor: Text | None = None


class FilePath(Arguments):
    path: Text


class FileMkdir(FilePath):
    parents: Annotated[bool, Field(strict=True)] = True


class FileMove(Arguments):
    source: Text
    destination: Text


class FileRemove(FilePath):
    recursive: Annotated[bool, Field(strict=True)] = False


ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


def check(model: type[ArgumentsT], given: Any) -> ArgumentsT:
    """Return the arguments of one call.

    Raises:
        Problem: `bad_request`, naming each argument that is wrong and what it should be.
    """
    if given is not None and not isinstance(given, Mapping):
        raise Problem("bad_request", "the arguments of a tool are an object")
    try:
        return model.model_validate(given or {})
    except ValidationError as exc:
        raise Problem("bad_request", explain(exc, sorted(model.model_fields))) from exc


def explain(error: ValidationError, accepted: list[str]) -> str:
    """Return what is wrong as one sentence; values are not repeated, since they may be secret or long."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False)[:6]:
        where = str(problem["loc"][0]) if problem["loc"] else "the arguments"
        if problem["type"] in ("missing", "missing_argument"):
            found.setdefault(where, f"{where!r} is missing")
        elif problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            found.setdefault(where, f"{where!r} is not known (known are: {', '.join(accepted)})")
        else:
            found.setdefault(where, f"{where!r}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(found.values())
