"""The interpreter of one session: runs what it is sent, and answers with the pictures and whether it went well.

    interpreter.py DESCRIPTOR

DESCRIPTOR is a stream socket. A request is a line of JSON, `{"code", "end"}`; the answer is one, `{"ok", "pictures":
[{"type", "data"}], "left_out"}`. Text goes to standard output and error, which are one; `end` is written there when
the code has ended. It runs on any Python 3.8 and later, and on the standard library alone.
"""

from __future__ import annotations

import ast
import base64
import builtins
import contextlib
import inspect
import io
import json
import linecache
import os
import signal
import socket
import sys
import traceback
import types
import warnings
from typing import Any, cast

PICTURES = 8
PICTURE_BYTES = 700_000
"""Of all pictures of an answer, in base64: MCP clients refuse answers over 1 MiB."""
ROWS, COLUMNS = 60, 30


class Shown:
    """What is to be shown of one request, beside text."""

    def __init__(self) -> None:
        self.pictures: list[dict[str, str]] = []
        self.left_out = 0
        self._bytes = 0

    def picture(self, kind: str, data: bytes) -> None:
        encoded = base64.b64encode(data).decode()
        if len(self.pictures) >= PICTURES or self._bytes + len(encoded) > PICTURE_BYTES:
            self.left_out += 1
            return
        self._bytes += len(encoded)
        self.pictures.append({"type": kind, "data": encoded})

    def value(self, value: Any) -> None:
        """Show a value as a notebook does: as a picture if it is one, a table as text, else by its `repr`."""
        for name, kind in _PICTURES_OF:
            make: Any = None if inspect.isclass(value) else getattr(value, name, None)
            if make is not None and (data := _bytes_of(make())):
                self.picture(kind, data)
                return
        if type(value).__module__.partition(".")[0] == "pandas" and type(value).__name__ == "DataFrame":
            table: Any = cast("Any", value)
            _say(table.to_string(max_rows=ROWS, max_cols=COLUMNS, show_dimensions=table.shape[0] > ROWS))
        else:
            _say(repr(value))

    def figures(self) -> None:
        """Show matplotlib's open figures, and close them."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        for number in pyplot.get_fignums():
            content = io.BytesIO()
            pyplot.figure(number).savefig(content, format="png", bbox_inches="tight")
            self.picture("image/png", content.getvalue())
        pyplot.close("all")


class Interpreter:
    def __init__(self) -> None:
        self._shown = Shown()
        self._count = 0
        module = types.ModuleType("__main__")  # what the code defines can be pickled as that module's
        sys.modules["__main__"] = module
        self._names = module.__dict__
        self._names.update(__builtins__=builtins, display=self._display)

    def _display(self, *values: Any) -> None:
        """Show values in the middle of the code."""
        for value in values:
            self._shown.value(value)

    def run(self, code: str) -> tuple[bool, Shown]:
        """Run code and show the value of its last line; return whether it raised nothing, and what is to be shown."""
        self._shown = shown = Shown()
        self._count += 1
        name = f"<run {self._count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # for tracebacks
        ok = False
        try:
            tree = ast.parse(code, name)
            last = ast.Expression(tree.body.pop().value) if _ends_in_value(tree) else None  # pyright: ignore
            exec(compile(tree, name, "exec"), self._names)
            if last is not None:
                value = eval(compile(last, name, "eval"), self._names)
                if value is not None:
                    self._names["_"] = value
                    shown.value(value)
            ok = True
        except SystemExit as exit:
            _say(f"SystemExit: {exit.code}; the interpreter goes on")
            ok = exit.code in (None, 0)
        except BaseException as error:  # KeyboardInterrupt, too: it is how a run is ended early
            _print_error(error)
        try:
            shown.figures()
        except Exception as error:
            ok = False
            _print_error(error)
        return ok, shown


_PICTURES_OF = (("_repr_png_", "image/png"), ("_repr_jpeg_", "image/jpeg"))


def _bytes_of(given: Any) -> bytes:
    """Return a picture as such a method returns it: bytes or base64, alone or with what is known of it."""
    while isinstance(given, tuple):
        given = cast("tuple[Any, ...]", given)[0]
    return base64.b64decode(given) if isinstance(given, str) else given or b""


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _ends_in_value(tree: ast.Module) -> bool:
    return bool(tree.body) and isinstance(tree.body[-1], ast.Expr)


def _print_error(error: BaseException) -> None:
    """Print a traceback without the lines of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(requests.fileno(), False)
    sys.argv = [""]
    sys.path[0] = ""
    warnings.filterwarnings("ignore", message=".*is non-interactive, and thus cannot be shown")
    interpreter, own = Interpreter(), os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in requests.makefile("rb"):
        request = json.loads(line)
        ok, shown = False, Shown()
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            ok, shown = interpreter.run(request["code"])
        except KeyboardInterrupt:  # between two lines of this file
            pass
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.getpid() != own:
            os._exit(0)  # the code forked, and this is what it forked
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os.write(1, request["end"].encode())
        answer = {"ok": ok, "pictures": shown.pictures, "left_out": shown.left_out}
        requests.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
