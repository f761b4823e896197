"""A hundred rollouts in one run: if this process dies in the middle, nothing of them is left after the run's lease.

Run `ash up` in another terminal, then: python examples/held_rollouts.py 100
Kill it with `kill -9` while it works, and see `ash list` become empty.
"""

from __future__ import annotations

import sys

import anyio

from ash_mcp import AshError, Hive, RunEnded, Sandbox

AT_ONCE = 16
LEASE_SECONDS = 30.0


async def rollout(box: Sandbox, number: int) -> int:
    """Stand in for an episode: a few steps of a policy, each a command."""
    total = 0
    for step in range(3):
        done = await box.exec(f"echo $(({number} + {step}))")
        total += int(done.stdout)
    return total


async def main(count: int) -> None:
    done: list[int] = []
    async with Hive() as hive, hive.run("rollouts", lease_seconds=LEASE_SECONDS) as run:
        limit = anyio.CapacityLimiter(AT_ONCE)

        async def one(number: int) -> None:
            async with limit:
                try:
                    async with run.spawn("general") as box:
                        done.append(await rollout(box, number))
                        print(f"rollout {number} is done", flush=True)
                except RunEnded:
                    raise  # nothing can be spawned in it any more: the trainer has to open another run
                except AshError as error:
                    print(f"rollout {number} is dropped: {error.message}", flush=True)

        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(one, number)
    print(f"{len(done)} of {count} rollouts are done, and nothing of them is left")


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 100)
