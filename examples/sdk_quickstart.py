"""The Python SDK in one sitting: a sandbox, a command, files, a tool, and its end.

Run `ash up` in another terminal, then: python examples/sdk_quickstart.py
"""

from __future__ import annotations

import anyio

from ash_mcp import Hive


async def main() -> None:
    # ASH_URL, ASH_TOKEN and ASH_SCOPE count; without them it is the hive on this machine.
    async with Hive() as hive, hive.spawn("general", env={"WHO": "you"}) as box:
        print(f"{box.session} is ready")

        done = await box.exec("echo hello $WHO; uname -s", timeout_seconds=30)
        print(f"exit code {done.exit_code}: {done.stdout!r}")

        await box.files.write("notes/plan.txt", "1. look around\n")
        await box.exec("echo '2. tidy up' >> notes/plan.txt", check=True)
        print(await box.files.read("notes/plan.txt"), end="")

        async for chunk in box.stream("for i in 1 2 3; do echo line $i; sleep 0.1; done"):
            print(f"  {chunk.stream}: {chunk.data.decode().rstrip()}")

        tools = await box.tools()
        print(f"{len(tools)} tools, such as {tools[0].name}")
        result = await box.call("terminal-controller_execute_command", command="pwd")
        print(f"the agent's terminal starts in {result.structured['cwd']}")
    print("and gone again")


if __name__ == "__main__":
    anyio.run(main)
