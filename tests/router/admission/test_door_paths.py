"""Paths of doors: one spelling leads to each, and no trick leads anywhere else."""

from __future__ import annotations

from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ash_router.admission.door_paths import DoorKind, DoorPath, read_door_path


def read(path: str) -> DoorPath | str | None:
    return read_door_path(path.encode("latin-1"), unquote(path.encode("latin-1").decode("latin-1")))


@pytest.mark.parametrize(
    ("path", "kind", "rest"),
    [
        ("/s/sb1/mcp", DoorKind.MCP, b""),
        ("/s/%73b1/%6dcp/", DoorKind.MCP, b""),
        ("/s/sb1/files", DoorKind.FILES, b""),
        ("/s/sb1/files/", DoorKind.FILES, b"/"),
        ("/s/sb1/files/a%20b/%C3%A4.txt", DoorKind.FILES, b"/a%20b/%C3%A4.txt"),
        ("/s/sb1/files/a/", DoorKind.FILES, b"/a/"),
        ("/s/sb1/files/...", DoorKind.FILES, b"/..."),
        ("/s/sb1/files/_ash/claim", DoorKind.FILES, b"/_ash/claim"),
        ("/s/sb1/files/50%25", DoorKind.FILES, b"/50%25"),
        ("/s/sb1/files/%252e%252e", DoorKind.FILES, b"/%252e%252e"),
        ("/s/sb1/ports/8000", DoorKind.PORTS, b"/8000"),
        ("/s/sb1/ports/8000/x/y", DoorKind.PORTS, b"/8000/x/y"),
        ("/s/sb1/terminal", DoorKind.TERMINAL, b""),
    ],
)
def test_a_canonical_path_leads_to_its_door(path: str, kind: DoorKind, rest: bytes):
    assert read(path) == DoorPath(kind, "sb1", rest)


TRICKS = [
    "/s/sb1/files/..", "/s/sb1/files/../mcp", "/s/sb1/files/a/../../../_ash/claim", "/s/sb1/files/./a",
    "/s/sb1/files/%2e%2e/a", "/s/sb1/files/%2E%2E", "/s/sb1/files/.%2e/a", "/s/sb1/files/a%2fb", "/s/sb1/files/a%2Fb",
    "/s/sb1/files%2fa", "/s/sb1%2ffiles/a", "/s/sb1/files//etc/passwd", "/s/sb1/files/a//b", "/s/sb1/files//",
    "/s/sb1/files/a%00", "/s/sb1/files/%61", "/s/%73b1/files/a", "/s/sb1/%66iles/a", "/%73/sb1/files/a",
    "/s/sb1/files/a\\b", "/s/sb1/files\\..\\x/", "/s/sb1/files/a|b", "/s/sb1/files/a%", "/s/sb1/files/a%zz",
    "/s/sb1/files/\xe4", "/s/sb1/files/a b", "/s/s b/files/a", "/s/../files/a", "/s//files/a",
    "/s/sb1/ports", "/s/sb1/ports/", "/s/sb1/ports/0", "/s/sb1/ports/080", "/s/sb1/ports/x", "/s/sb1/ports/100000",
    "/s/sb1/ports/-1/x", "/s/sb1/ports/8000/..", "/s/sb1/terminal/", "/s/sb1/terminal/x",
]  # fmt: skip


@pytest.mark.parametrize("path", [path for path in TRICKS if "files\\" not in path])
def test_another_spelling_is_refused(path: str):
    assert isinstance(read(path), str)


@pytest.mark.parametrize(
    "path",
    [
        "/s/sb1/files\\..\\x/", "/s\\sb1\\files\\a", "//s/sb1/files/a", "/s/sb1/mcp/../files/a", "/s/sb1/x/../files/a",
        "/S/sb1/files/a", "/s/sb1/filesystem", "/s/sb1/files;x", "/s/sb1/_ash/files/a", "/_ash/files/a",
        "/s/sb1%252ffiles/a", "/s/sb1/Files/a", "/x/../s/sb1/files/a",
    ],
)  # fmt: skip
def test_what_is_no_doors_path_leads_to_none(path: str):
    assert read(path) is None


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)


@given(st.lists(names, min_size=1), st.booleans())
def test_whatever_names_are_encoded_once_come_back_as_they_were(names: list[str], is_folder: bool):
    rest = "".join("/" + quote(name, safe="") for name in names) + ("/" if is_folder else "")
    found = read(f"/s/sb1/files{rest}")
    if {".", ".."} & set(names):
        assert isinstance(found, str)
    else:
        assert found == DoorPath(DoorKind.FILES, "sb1", rest.encode())


@given(st.text(st.sampled_from("/.%2eEfF50dc\\a"), max_size=20))
def test_what_passes_has_the_segments_that_it_shows(rest: str):
    found = read(f"/s/sb1/files/{rest}")
    if isinstance(found, DoorPath):
        shown = found.rest.decode()
        names = [unquote(segment) for segment in shown.split("/")]
        assert "/".join(names) == unquote(shown)
        assert not {".", ".."} & set(names) and "" not in names[1:-1]
