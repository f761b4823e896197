"""Rollouts that begin from one prepared state, each going back to it ten times; all in a run that leaves nothing.

Run `ash up` as root in another terminal, then: python examples/reset_rollouts.py 100 10
Kill it with `kill -9` while it works, and see `ash list` and `ash snapshot list` become empty.
"""

from __future__ import annotations

import sys

import anyio

from ash_mcp import AshError, Hive, RunEnded, Sandbox, SnapshotInfo

AT_ONCE = 8
LEASE_SECONDS = 30.0


async def rollout(box: Sandbox, start: SnapshotInfo, number: int, episodes: int) -> int:
    """Stand in for episodes of a policy that leaves a mess behind; return how many began clean."""
    clean = 0
    for episode in range(episodes):
        done = await box.exec("cat task.txt && rm -r /workspace/* /usr/share/doc", check=True)
        clean += done.stdout == "the task\n"
        await box.reset(start)
        print(f"rollout {number}: episode {episode} is done", flush=True)
    return clean


async def main(count: int, episodes: int) -> None:
    clean: list[int] = []
    async with Hive() as hive, hive.run("resets", lease_seconds=LEASE_SECONDS) as run:
        async with run.spawn("general", network="none") as first:
            await first.files.write("task.txt", "the task\n")
            start = await first.snapshot()
        limit = anyio.CapacityLimiter(AT_ONCE)

        async def one(number: int) -> None:
            async with limit:
                try:
                    async with run.spawn(snapshot=start, network="none") as box:
                        clean.append(await rollout(box, start, number, episodes))
                except RunEnded:
                    raise  # nothing can be spawned in it any more: the trainer has to open another run
                except AshError as error:
                    print(f"rollout {number} is dropped: {error.message}", flush=True)

        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(one, number)
    print(f"{len(clean)} of {count} rollouts are done, and {sum(clean)} episodes began from the same files")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    anyio.run(main, given[0] if given else 100, given[1] if len(given) > 1 else 10)
