"""What is shown through an overlay, by a process with mounts of its own as bubblewrap's launcher has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ash_hub.backends.local.keeper.launchers import mount_names
from tests.hub.backends.local import known_host

pytestmark = pytest.mark.skipif(not known_host.facts().own_inodes, reason="this host lets nobody mount overlays")

SCRIPT = """
import ctypes, os, sys
sys.path.append(sys.argv[1])
from mount_names import own_mounts, show
os.chdir(sys.argv[2])
own_mounts()
if "below" in sys.argv:
    assert ctypes.CDLL(None).mount(b"other", b"shown/below", None, ctypes.c_ulong(0x1000), None) == 0
is_whole = show([(os.path.abspath("seen"), os.path.abspath("shown"))], os.path.abspath("empty"))
same = os.path.samestat(os.stat("shown/below/.."), os.stat("seen/below/.."))
print(open("seen/below/file").read(), "the host's" if same else "its own", is_whole)
"""
LAUNCH = """
import ctypes, json, os, sys
sys.path.append(sys.argv[1])
from launchers.bubblewrap import BubblewrapLauncher
from launchers.mount_names import own_mounts
from launchers.plan import Mount, Plan
os.chdir(sys.argv[2])
own_mounts()
if "below" in sys.argv:
    assert ctypes.CDLL(None).mount(b"other", b"shown/below", None, ctypes.c_ulong(0x1000), None) == 0
shown = os.path.abspath("shown")
plan = Plan(command=(), python="", mounts=(Mount("bind", "/shown", shown, overlay=shown),))
child = BubblewrapLauncher("/bin/true", frozenset()).launch(plan)
os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
print(json.dumps(child.warnings))
"""


def shown(place: Path, *words: str, script: str = SCRIPT, code: Path = Path(mount_names.__file__).parent) -> str:
    """Return what is seen of `place/shown` through `place/seen`, and whose inode that is."""
    for name, text in (("shown/below", "plain"), ("other", "mounted")):
        (place / name).mkdir(parents=True)
        (place / name / "file").write_text(text)
    for name in ("seen", "empty"):
        (place / name).mkdir()
    command = [sys.executable, "-I", "-S", "-c", script, str(code), str(place), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def test_a_directory_is_seen_through_inodes_of_its_own(tmp_path: Path) -> None:
    assert shown(tmp_path) == "plain its own True"


def test_what_is_mounted_below_a_directory_is_seen_with_it(tmp_path: Path) -> None:
    assert shown(tmp_path, "below") == "mounted the host's False"


@pytest.mark.parametrize(("words", "warned"), [((), False), (("below",), True)])
def test_a_launch_that_shows_the_host_s_inodes_warns_of_it(
    tmp_path: Path, words: tuple[str, ...], warned: bool
) -> None:
    said = shown(tmp_path, *words, script=LAUNCH, code=Path(mount_names.__file__).parents[1])
    assert ("shared as it is" in said) is warned
