"""The recipe `swe`: patches that fit or change nothing, and the search."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from fastmcp import Client
from hypothesis import given
from hypothesis import strategies as st

from ash_recipes.runner.context import Context, install
from ash_recipes.swe import RECIPE
from ash_recipes.swe.patches import PatchProblem, applied, parse
from ash_recipes.swe.server import build

TEXT = "one\ntwo\nthree\nfour\nfive\nsix\n"


def patched(text: str | None, patch: str) -> str | None:
    (change,) = parse(patch)
    return applied(change, text)


def envelope(body: str, head: str = "Update File: f") -> str:
    return f"*** Begin Patch\n*** {head}\n{body}*** End Patch\n"


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ("@@\n two\n-three\n+3\n four\n", "one\ntwo\n3\nfour\nfive\nsix\n"),
        ("@@\n-one\n@@\n five\n+more\n", "two\nthree\nfour\nfive\nmore\nsix\n"),
        ("@@ four\n-five\n", "one\ntwo\nthree\nfour\nsix\n"),
        ("@@\n+seven\n", TEXT + "seven\n"),
        ("@@ -99,2 +99,1 @@\n two\n-three\n", "one\ntwo\nfour\nfive\nsix\n"),
        (" one\n-two\n", "one\nthree\nfour\nfive\nsix\n"),
        ("@@\n   two  \n-three\n+3\n", "one\ntwo\n3\nfour\nfive\nsix\n"),
        ("@@\n six\n+seven\n*** End of File\n", TEXT + "seven\n"),
    ],
)
def test_hunks_go_where_their_lines_are(body: str, after: str) -> None:
    assert patched(TEXT, envelope(body)) == after


def test_files_are_added_deleted_and_updated_only_where_that_is_possible() -> None:
    assert patched(None, envelope("+a\n+\n+b\n", "Add File: f")) == "a\n\nb\n"
    assert patched("x", envelope("", "Delete File: f")) is None
    for text, head, why in (("x", "Add File: f", "there already"), (None, "Delete File: f", "no file f")):
        with pytest.raises(PatchProblem, match=why):
            patched(text, envelope("", head))


@pytest.mark.parametrize(
    ("patch", "why"),
    [
        ("", "no file is named"),
        ("hello", "no file is named"),
        (envelope("@@\n-no such line\n"), "the lines of hunk 1 are not there, the first of which is 'no such line'"),
        (envelope("@@ nowhere\n-two\n"), "hunk 1 are not there after 'nowhere'"),
        (envelope("@@\n two\n@@\n-one\n"), "hunk 2"),
        (envelope("two\n"), "line 3 of the patch begins neither"),
        ("*** Begin Patch\n+x\n*** End Patch", "stands before the first"),
        ("--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n one\n", "fewer lines"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(patch: str, why: str) -> None:
    with pytest.raises(PatchProblem, match=why):
        patched(TEXT, patch)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_what_diff_writes_gives_the_other_text(before: list[str], after: list[str]) -> None:
    import difflib

    old, new = ("".join(f"{line}\n" for line in lines) for lines in (before, after))
    diff = "\n".join(difflib.unified_diff(before, after, "a/f", "b/f", lineterm=""))
    if diff and before and after:
        assert patched(old, diff) == new


@pytest.mark.anyio
async def test_a_patch_changes_all_files_or_none_and_the_search_finds_lines(context: Context) -> None:
    install(context)
    place = context.workspace
    (place / "a.py").write_text("x = 1\ny = 2\n")
    (place / "old").write_text("gone\n")
    body = (
        "*** Begin Patch\n*** Update File: a.py\n*** Move to: src/b.py\n@@\n-x = 1\n+x = 3\n"
        "*** Add File: new/c.py\n+x = 9\n"
    )
    async with Client(build()) as client:
        names = {tool.name for tool in await client.list_tools()}
        assert names == set(RECIPE["tools"]) and "terminal-controller_execute_command" in names
        bad = body + "*** Update File: old\n@@\n-nothing\n*** End Patch"
        result = await client.call_tool_mcp("apply_patch", {"patch": bad})
        assert result.is_error and "hunk 1 are not there" in str(result.content)
        assert sorted(path.name for path in place.iterdir()) == ["a.py", "old"]

        good = body + "*** Delete File: old\n*** End Patch"
        result = await client.call_tool_mcp("apply_patch", {"patch": good})
        assert not result.is_error and "updated a.py, moved to src/b.py" in str(result.content)
        assert (place / "src" / "b.py").read_text() == "x = 3\ny = 2\n"
        assert sorted(str(path.relative_to(place)) for path in place.rglob("*.py")) == ["new/c.py", "src/b.py"]

        async def found(**arguments: object) -> str:
            return str((await client.call_tool_mcp("search", arguments)).content)

        assert "src/b.py:1:x = 3" in await found(pattern="^x", glob="b*.py")
        assert "c.py" not in await found(pattern="^x", glob="b*.py")
        assert "nothing found" in await found(pattern="^Z")
        assert "c.py:1:x = 9" in await found(pattern="^X = [89]", ignore_case=True, path="new")
        assert (await client.call_tool_mcp("search", {"pattern": "("})).is_error


@pytest.mark.anyio
async def test_a_file_is_one_however_its_path_is_written(context: Context) -> None:
    install(context)
    place = context.workspace
    (place / "src").mkdir()
    (place / "way").symlink_to("src")
    (place / "src/tool").write_text(TEXT)
    (place / "src/tool").chmod(0o750)
    body = "".join(
        f"*** Update File: {path}\n@@\n-{old}\n+{new}\n"
        for path, old, new in (("src/tool", "one", "1"), ("./src//tool", "two", "2"), ("way/tool", "three", "3"))
    )
    async with Client(build()) as client:
        patch = (
            f"*** Begin Patch\n{body}*** Update File: src/tool\n*** Move to: src/moved\n@@\n-six\n+6\n*** End Patch"
        )
        result = await client.call_tool_mcp("apply_patch", {"patch": patch})
        assert not result.is_error, result.content
        assert (place / "src/moved").read_text() == "1\n2\n3\nfour\nfive\n6\n"
        assert stat.S_IMODE((place / "src/moved").stat().st_mode) == 0o750
        assert sorted(path.name for path in (place / "src").iterdir()) == ["moved"]
        added = "*** Begin Patch\n*** Add File: a\n+x\n*** Update File: a\n*** Move to: b\n@@\n-x\n+y\n*** End Patch"
        assert not (await client.call_tool_mcp("apply_patch", {"patch": added})).is_error
        assert (place / "b").read_text() == "y\n" and not (place / "a").exists()
        for path in ("src/moved/x", "n" * 300, "a\0b"):
            refused = await client.call_tool_mcp("apply_patch", {"patch": envelope("+x\n", f"Add File: {path}")})
            assert refused.is_error and ("NUL" if "\0" in path else path) in str(refused.content)


@pytest.mark.parametrize(
    "part",
    [
        "diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n",
        "diff --git a/x b/x\nnew file mode 100644\nindex 0000000..e69de29\n",
        "diff --git a/x b/x\nindex 1..2 100644\nBinary files a/x and b/x differ\n",
        "diff --git a/x b/x\nold mode 100644\nnew mode 100755\n",
    ],
)
def test_what_git_changes_without_lines_is_refused_and_not_left_out(part: str) -> None:
    whole = "diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-one\n+1\n"
    for patch in (part + whole, whole + part):
        with pytest.raises(PatchProblem, match="nothing says what becomes of 'diff --git a/x"):
            parse(patch)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_what_git_writes_is_read(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        options = ("-c", "user.name=t", "-c", "user.email=t@t.test")
        return subprocess.run(
            ["git", *options, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "f").write_text(TEXT)
    (tmp_path / "gone").write_text("x\n")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "f").write_text(TEXT.replace("four", "4"))
    (tmp_path / "made").write_text("new\n")
    (tmp_path / "gone").unlink()
    git("add", ".")
    changes = {change.path: change for change in parse(git("diff", "--cached"))}
    assert {path: change.kind for path, change in changes.items()} == {"f": "update", "gone": "delete", "made": "add"}
    assert applied(changes["f"], TEXT) == TEXT.replace("four", "4") and applied(changes["made"], None) == "new\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
