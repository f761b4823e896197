"""A machine from outside: commands as root and as other users, through the SDK and the tools of `general`."""

from __future__ import annotations

import anyio.to_thread
import pytest

from ash_mcp import Hive
from ash_mcp.errors import AshError
from tests.hub.backends.local import known_host
from tests.hub.backends.local.local_parts import needs_isolation
from tests.system.crash_parts import home

_PROBLEM = known_host.machine_problem()
pytestmark = [
    pytest.mark.anyio,
    needs_isolation,
    pytest.mark.skipif(_PROBLEM is not None, reason=f"this host can have no machines: {_PROBLEM}"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_commands_run_as_root_and_as_whom_the_caller_names() -> None:
    with home() as place:
        async with Hive(await anyio.to_thread.run_sync(place.start)) as hive:
            box = await hive.spawn("general")
            assert (await box.exec("id -un; echo $HOME; useradd -m joe")).stdout == "root\n/root\n"
            done = await box.exec("id -un; id -Gn; echo $USER $HOME; touch /usr/x || echo refused", user="joe")
            assert done.stdout == "joe\njoe\njoe /home/joe\nrefused\n"
            with pytest.raises(AshError, match="this sandbox has no user 'bob'; it has root, daemon"):
                await box.exec("id", user="bob")
            tool = "terminal-controller_execute_command"
            told = await box.call(tool, command="id -un; cd /tmp", user="joe")
            assert told.structured is not None and told.structured["stdout"] == "joe\n"
            assert told.structured["cwd"] == "/workspace"
            refused = await box.call(tool, command="id", user="bob")
            assert refused.is_error and "no user 'bob'" in str(refused.content)
            # A job of another user's is ended like any other.
            slow = await box.exec("sleep 60", user="joe", timeout_seconds=0.5)
            assert slow.timed_out
            # What speaks for the sandbox does not need what root inside has broken.
            assert (await box.exec("rm -rf /usr/lib/python3* /usr/lib/x86_64-linux-gnu/libssl* /opt/x")).exit_code == 0
            assert (await box.exec("echo here")).stdout == "here\n"
            await box.files.write("/etc/motd", "hello")
            assert (await box.exec("cat /etc/motd")).stdout == "hello"
        assert place.stop_hub() == 0
