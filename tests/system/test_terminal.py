"""Terminals of sandboxes as people use them: in tmux, with vim, through cut connections and two replicas."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import anyio
import httpx
import pytest

from ash_mcp import Conflict, Hive, PtyNotFound, Sandbox, SandboxGone
from ash_mcp.errors import CommandNotStarted
from tests.cutting_proxy import CuttingProxy, cutting
from tests.hive_process import ASH
from tests.redis_server import RedisServer
from tests.system.crash_parts import Home, home

pytestmark = [pytest.mark.anyio, pytest.mark.heavy, pytest.mark.timeout(600)]

SECONDS: Final = 120
VI: Final = next((name for name in ("vim", "vim.tiny") if shutil.which(name)), None)
needs_tmux = pytest.mark.skipif(
    shutil.which("tmux") is None or VI is None, reason="needs tmux and vim (apt: tmux, vim-tiny)"
)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": False}


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


class Tmux:
    """One window of a tmux server of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._socket = str(folder / "tmux")

    async def run(self, *words: str) -> str:
        done = await anyio.run_process(["tmux", "-S", self._socket, "-f", "/dev/null", *words])
        return done.stdout.decode()

    async def keys(self, *keys: str) -> None:
        """Press keys by their names in tmux; other words are typed as they are."""
        await self.run("send-keys", *keys)

    async def enter(self, line: str) -> None:
        await self.run("send-keys", "-l", line)
        await self.keys("Enter")

    async def screen(self) -> str:
        return await self.run("capture-pane", "-p")

    async def see(self, text: str) -> str:
        """Wait until the screen shows a text, and return all that it shows."""
        shown = ""
        try:
            with anyio.fail_after(SECONDS):
                while text not in (shown := await self.screen()):
                    await anyio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"the screen never showed {text!r}:\n{shown}") from None
        return shown


@asynccontextmanager
async def tmux(url: str) -> AsyncGenerator[Tmux]:
    """A window in which a shell of this machine runs, with `ash` for the hive."""
    with tempfile.TemporaryDirectory(prefix="ash-", dir="/tmp") as folder:
        window = Tmux(Path(folder))
        start = Path(folder) / "start"
        start.write_text(f"PS1='here> '\nash() {{ {shlex.join(ASH)} \"$@\"; }}\n")
        shell = f"env -u ASH_TOKEN -u ASH_SCOPE ASH_URL={url} TERM=screen-256color bash --rcfile {start} -i"
        await window.run("new-session", "-d", "-x", "100", "-y", "30", shell)
        await window.run("set", "-g", "status", "off")
        try:
            await window.see("here>")
            yield window
        finally:
            await window.run("kill-server")


@pytest.fixture
async def box(hive_url: str) -> AsyncGenerator[Sandbox]:
    async with Hive(hive_url) as hive, hive.spawn("general", network="none") as box:
        yield box


@needs_tmux
async def test_a_shell_in_tmux_with_vim_interrupts_and_resizing_leaves_the_terminal_as_it_was(
    hive_url: str, box: Sandbox
):
    async with tmux(hive_url) as window:
        await window.enter(f"ash shell {box.session}")
        await window.see("/workspace#")
        await window.enter(f"{VI} -u NONE -N letter.txt")
        await window.see('"letter.txt"')
        await window.keys("i", "Dear Sir", "Escape", "o", "from vim", "Escape")
        await window.see("from vim")
        await window.run("resize-window", "-x", "120", "-y", "40")
        with anyio.fail_after(SECONDS):
            while "lines=40" not in (shown := await window.screen()):  # the size is on its way
                await window.keys("Escape", ":", "set columns? lines?", "Enter")
        assert "columns=120" in shown
        await window.keys("Escape", ":", "wq", "Enter")
        await window.see("letter.txt\nroot@sandbox:/workspace#")
        await window.enter("clear; cat letter.txt; stty size")
        await window.see("Dear Sir\nfrom vim\n40 120")
        await window.enter("sleep 1000")
        await window.see("sleep 1000")
        await window.keys("C-c")
        await window.enter("echo code $?")
        await window.see("code 130")
        await window.enter("exit 7")
        await window.see("exit\nhere>")
        await window.enter("echo code=$? $(stty -a | grep -o ' -icanon\\| -echo ' || echo cooked)")
        await window.see("code=7 cooked")
    assert await box.files.read("letter.txt") == "Dear Sir\nfrom vim\n"


@needs_tmux
async def test_exec_it_runs_a_command_and_takes_its_exit_code(hive_url: str, box: Sandbox):
    async with tmux(hive_url) as window:
        await window.enter(f"ash exec -it -e WHO=me {box.session} -- 'tty; echo $WHO; read line; exit 3'")
        await window.see("/dev/pts/")
        await window.see("me")
        await window.keys("Enter")
        await window.see("me\n\nhere>")
        await window.enter("echo code=$?")
        await window.see("code=3")
        await window.enter(f"ash exec -t {box.session} -- no-such-program here; echo code=$?")
        shown = await window.see("code=1")
        assert "no-such-program" in shown
        await window.enter(f"clear; echo x | ash exec -it {box.session} -- cat; echo code=$?")
        shown = await window.see("code=2")
        assert "ash exec -i" in shown


@asynccontextmanager
async def two_replicas(place: Home) -> AsyncGenerator[CuttingProxy]:
    urls = place.start(), place.start()
    async with cutting([port_of(url) for url in urls]) as proxy:
        yield proxy


@pytest.fixture
def place(redis: RedisServer) -> Iterator[Home]:
    with home(ASH_HUB_REDIS_URL=redis.url) as place:
        yield place


@needs_tmux
@pytest.mark.redis
async def test_a_cut_connection_is_not_noticed_and_a_terminal_that_was_left_is_come_back_to(place: Home):
    async with two_replicas(place) as proxy, Hive(proxy.url) as hive, tmux(proxy.url) as window:
        box = await hive.spawn("general", network="none")
        await window.enter(f"ash shell {box.session}")
        await window.see("/workspace#")
        await window.enter(f"{VI} -u NONE -N letter.txt")
        await window.see('"letter.txt"')
        await window.keys("i", "one ")
        await window.see("one")
        for word in ("two ", "three "):  # by the other replica each time
            before = proxy.connections
            proxy.cut()
            await window.keys(word)
            await window.see(word.strip())
            assert proxy.connections > before
        await window.keys("Enter", "~.")  # vim gets the Enter, and not the rest
        shown = await window.see("comes back to it")
        assert "here>" in await window.screen()
        pty = next(word for word in shown.split() if word.startswith("pty-")).rstrip("`")
        await window.enter("clear; echo $(stty -a | grep -o ' -icanon' || echo cooked)")
        await window.see("cooked")
        await window.enter(f"clear; ash shell {box.session} --attach {pty}")
        await window.see("one two three")
        await window.keys("four", "Escape", ":", "wq", "Enter")
        await window.see("letter.txt\nroot@sandbox:/workspace#")
        await window.enter("exit")
        await window.see("exit\nhere>")
        assert await box.files.read("letter.txt") == "one two three \nfour\n"


@pytest.mark.redis
async def test_a_program_reads_every_byte_once_through_cuts_and_replicas(place: Home):
    async with two_replicas(place) as proxy, Hive(proxy.url) as hive:
        box = await hive.spawn("echo", network="none")
        expected = "".join(f"{number}\r\n" for number in range(1, 100_001)).encode()
        async with box.pty(["seq", "100000"]) as pty:
            got, cuts = b"", 0
            async for data in pty:
                got += data
                if len(got) > (cuts + 1) * 150_000:
                    cuts += 1
                    proxy.cut()
        assert cuts >= 3
        assert (got == expected, pty.lost_bytes, pty.exit_code) == (True, 0, 0)


@pytest.mark.redis
async def test_what_is_typed_through_cuts_arrives_once_and_in_order(place: Home):
    async with two_replicas(place) as proxy, Hive(proxy.url) as hive:
        box = await hive.spawn("echo", network="none")
        async with box.pty("stty raw -echo; echo ready; head -c 60000 > typed; wc -c < typed") as pty:
            shown = b""
            while b"ready" not in shown:
                shown += await pty.read()
            sent = b"".join(b"%05d " % number for number in range(10_000))
            for start in range(0, len(sent), 3000):
                await pty.write(sent[start : start + 3000])
                if start % 12_000 == 0:
                    proxy.cut()
            async for data in pty:
                shown += data
        assert b"60000" in shown
        assert await box.files.read_bytes("typed") == sent


@pytest.mark.redis
async def test_a_terminal_outlives_the_replica_that_showed_it(place: Home):
    first, second = place.start(), place.start()
    async with cutting([port_of(first), port_of(second)]) as proxy, Hive(proxy.url) as hive:
        box = await hive.spawn("echo", network="none")
        async with Hive(second) as other:
            pty = (await other.attach(box.id)).pty("cat")
            await pty.write("before\n")
            shown = b""
            while b"before\r\nbefore\r\n" not in shown:
                shown += await pty.read()
            place.kill_hub()  # the second
            await pty.detach()
        async with box.attach_pty(pty.id, offset=pty.offset) as again:
            await again.write("after\n")
            shown = b""
            while b"after\r\nafter\r\n" not in shown:
                shown += await again.read()
            assert b"before" not in shown


async def test_a_terminal_ends_with_its_sandbox_and_says_why(hive_url: str):
    async with Hive(hive_url) as hive:
        box = await hive.spawn("echo")
        async with box.pty("cat") as pty:
            await pty.write("x\n")
            await pty.read()
            await box.destroy()
            with anyio.fail_after(SECONDS), pytest.raises(SandboxGone):
                while await pty.read():
                    pass


async def test_who_attaches_takes_the_terminal_over(box: Sandbox):
    async with box.pty("cat") as pty:
        await pty.write("first\n")
        seen = b""
        while b"first\r\nfirst\r\n" not in seen:
            seen += await pty.read()
        async with box.attach_pty(pty.id) as other:
            assert (await other.read()).startswith(b"first")
            with pytest.raises(Conflict):
                while await pty.read():
                    pass
            assert [(info.running, info.attached) for info in await box.ptys()] == [(True, True)]
        assert [info.running for info in await box.ptys()] == [True]
        with pytest.raises(PtyNotFound):
            async with box.attach_pty("pty-77"):
                pass


async def test_what_cannot_start_says_so(box: Sandbox):
    with pytest.raises(CommandNotStarted, match="no-such"):
        async with box.pty(["no-such"]):
            pass


async def test_a_cancelled_exec_ends_its_command_at_once(box: Sandbox):
    with anyio.move_on_after(0.5):
        await box.exec("echo $$ > pid; exec sleep 1000")
    pid = (await box.files.read("pid")).strip()
    done = await box.exec(f"ps -o stat= -p {pid} | grep -v Z")
    assert (done.exit_code, done.stdout) == (1, "")
    with anyio.move_on_after(0.5):
        await box.exec("echo $$ > pid2; exec sleep 1000", on_stdout=print)
    pid = (await box.files.read("pid2")).strip()
    done = await box.exec(f"ps -o stat= -p {pid} | grep -v Z")
    assert (done.exit_code, done.stdout) == (1, "")


async def test_a_page_of_another_site_opens_no_terminal(hive_url: str, box: Sandbox):
    """A browser sends its `Origin` with a WebSocket, and asks nobody before."""
    url = hive_url.removesuffix("/mcp") + f"/s/{box.id}/terminal"
    headers = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    async with httpx.AsyncClient() as client:
        refused = await client.get(url, headers={**headers, "origin": "http://evil.test"})
        assert refused.status_code == 403
        assert (await client.get(url)).status_code == 426
        assert (await client.post(url)).status_code == 405
        assert (await client.get(f"{url}/x", headers=headers)).status_code == 400
    assert os.environ.get("ASH_TEST_URL") or (await box.ptys()) == []
