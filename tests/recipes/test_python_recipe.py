"""The recipe `python`: what a session keeps, shows and survives."""

from __future__ import annotations

import base64
import os
import struct
import sys
import zlib

import anyio
import pytest
from fastmcp import Client
from mcp_types import ImageContent, TextContent

from ash_recipes.python import RECIPE
from ash_recipes.python.server import build
from ash_recipes.python.session import TEXT_BYTES, Session
from ash_recipes.runner.context import Context, install

pytestmark = pytest.mark.anyio


@pytest.fixture
def session(context: Context) -> Session:
    return Session(context, sys.executable)


async def test_variables_last_and_the_last_value_is_shown(session: Session) -> None:
    assert (await session.run("import math\nx = 40", 30)).text == ""
    ran = await session.run("print('so'); y = x + 2\ny", 30)
    assert ran.ok and ran.text == "so\n42\n"
    assert (await session.run("_ + math.floor(0.5)", 30)).text == "42\n"
    assert (await session.run("class A: pass\nimport pickle; len(pickle.dumps(A())) > 1", 30)).text == "True\n"


async def test_an_error_shows_its_own_lines_and_ends_nothing(session: Session) -> None:
    ran = await session.run("x = 1\ndef f():\n    raise ValueError('no')\nf()", 30)
    assert not ran.ok and ran.text.count("File") == 2 and "    raise ValueError('no')" in ran.text
    assert "interpreter.py" not in ran.text and ran.text.endswith("ValueError: no\n")
    assert "SyntaxError" in (await session.run("x = (", 30)).text
    ran = await session.run("import sys; sys.exit(3)", 30)
    assert not ran.ok and "SystemExit: 3" in ran.text
    assert (await session.run("x", 30)).text == "1\n"


async def test_what_programs_write_is_shown_in_order(session: Session) -> None:
    ran = await session.run("import os, sys\nprint(1)\nos.system('echo 2; echo 3 >&2')\nprint(4, file=sys.stderr)", 30)
    assert ran.text == "1\n2\n3\n4\n"
    assert "EOFError" in (await session.run("input()", 30)).text


async def test_a_late_run_is_interrupted_and_one_that_does_not_stop_is_replaced(session: Session) -> None:
    await session.run("x = 1", 30)
    ran = await session.run("import time\ntry:\n  time.sleep(60)\nfinally: print('ended')", 0.5)
    assert ran.timed_out and ran.lost is None and "ended\n" in ran.text and "KeyboardInterrupt" in ran.text
    assert (await session.run("x", 30)).text == "1\n"
    with anyio.move_on_after(0.5):
        await session.run("time.sleep(60)", 60)
    assert (await session.run("x + 1", 30)).text == "2\n"


async def test_an_interpreter_that_ends_is_a_new_one_and_says_so(session: Session) -> None:
    await session.run("x = 1", 30)
    ran = await session.run("import os; print('last', flush=True); os._exit(9)", 30)
    assert not ran.ok and ran.lost == "it ended with exit code 9" and ran.text == "last\n"
    assert "NameError" in (await session.run("x", 30)).text


async def test_what_code_forks_never_answers_in_its_place(session: Session) -> None:
    ran = await session.run("import os\npid = os.fork()\nif pid: print(os.waitpid(pid, 0)[1])", 30)
    assert ran.ok and ran.text == "0\n"
    assert (await session.run("pid > 0", 30)).text == "True\n"


async def test_code_that_answers_in_the_interpreters_place_spoils_no_later_run(session: Session) -> None:
    code = (
        "import os, stat, time\n"
        "for it in map(int, os.listdir('/proc/self/fd')):\n"
        "    try:\n"
        "        if it > 2 and stat.S_ISSOCK(os.fstat(it).st_mode): os.write(it, b'{}\\n')\n"
        "    except OSError: pass\n"
        "time.sleep(0.2)\n"
        "print('whole')"
    )
    await session.run(code, 30)
    assert (await session.run("6 * 7", 30)).text == "42\n"


async def test_long_text_is_cut_in_the_middle(session: Session) -> None:
    ran = await session.run("print('a' + 'x' * 3_000_000 + 'z')", 30)
    assert len(ran.text) < TEXT_BYTES + 100 and "bytes left out" in ran.text
    assert ran.text.startswith("a") and ran.text.endswith("z\n")


def png(size: int = 1) -> bytes:
    """Return a picture that hardly compresses."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + os.urandom(3 * size) for _ in range(size))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


async def test_pictures_come_as_images_up_to_a_bound(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_directory = context.workspace.parent / "bin"
    bin_directory.mkdir()
    (bin_directory / "python3").symlink_to(sys.executable)
    context.environment.variables()
    monkeypatch.setattr(
        context.environment,
        "_variables",
        {**context.environment.variables(), "PATH": f"{bin_directory}:/usr/bin:/bin"},
    )
    install(context)
    (context.workspace / "small.png").write_bytes(png())
    (context.workspace / "large.png").write_bytes(png(350))
    shows = (
        "class P:\n  def __init__(self, name): self.name = name\n"
        "  def _repr_png_(self): return open(self.name, 'rb').read()\n"
    )
    async with Client(build()) as client:
        assert {tool.name for tool in await client.list_tools()} == set(RECIPE["tools"])
        result = await client.call_tool_mcp(
            "run", {"code": f"{shows}display(P('small.png'))\nprint('text')\nP('small.png')"}
        )
        text, *images = result.content
        assert isinstance(text, TextContent) and text.text == "text" and not result.is_error
        assert [base64.b64decode(it.data) for it in images if isinstance(it, ImageContent)] == [
            (context.workspace / "small.png").read_bytes()
        ] * 2
        result = await client.call_tool_mcp("run", {"code": "display(P('large.png'), P('large.png'))"})
        assert [type(it) for it in result.content] == [TextContent, ImageContent] and "1 pictures left out" in str(
            result
        )
        failed = await client.call_tool_mcp("run", {"code": "1/0"})
        assert failed.is_error and "ZeroDivisionError" in str(failed.content)
        await client.call_tool_mcp("restart", {})
        assert "NameError" in str((await client.call_tool_mcp("run", {"code": "P"})).content)


PYPLOT = """
class Figure:
    def savefig(self, target, format, bbox_inches): target.write(b"picture")
open_figures = [1, 2]
def get_fignums(): return list(open_figures)
def figure(number): return Figure()
def close(which): open_figures.clear()
"""
PANDAS = """
class DataFrame:
    shape = (100, 2)
    def to_string(self, max_rows, max_cols, show_dimensions): return f"table of {max_rows}, {show_dimensions}"
"""


async def test_open_figures_and_tables_are_shown(context: Context, session: Session) -> None:
    """Stand-ins of the two libraries, with what the interpreter uses of them."""
    (context.workspace / "matplotlib").mkdir()
    (context.workspace / "matplotlib" / "pyplot.py").write_text(PYPLOT)
    (context.workspace / "pandas.py").write_text(PANDAS)
    ran = await session.run("import pandas, matplotlib.pyplot\npandas.DataFrame()", 30)
    assert ran.text == "table of 60, True\n"
    assert [(kind, base64.b64decode(data)) for kind, data in ran.pictures] == [("image/png", b"picture")] * 2
    assert not (await session.run("1", 30)).pictures
