"""The shape of a trainer: many rollouts at once, each in a sandbox of its own, and failures told apart.

A failure that is a consequence of what the policy did (`trainable`) counts as an outcome. One that is ours must not
teach it anything: the rollout is done again if that may help (`retryable`), or dropped.

Run `ash up` in another terminal, then: python examples/parallel_rollouts.py 8
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from ash_mcp import AshError, Hive

AT_ONCE = 4
ATTEMPTS = 3
TASK = "def test_it():\n    from answer import double\n    assert double(21) == 42\n"

# What a policy might have written, stood in for by a list: right, wrong, endless, and not even Python.
POLICY: Sequence[str] = (
    "def double(x):\n    return 2 * x\n",
    "def double(x):\n    return x + 1\n",
    "def double(x):\n    while True: pass\n",
    "def double(x) return 2x\n",
)


@dataclass(frozen=True)
class Outcome:
    """What one rollout is worth to a trainer; `reward` is None for one that must not be learnt from."""

    reward: float | None
    why: str


async def rollout(hive: Hive, action: str) -> Outcome:
    """Try one action in a fresh sandbox and judge it there."""
    async with hive.spawn("general", ttl_seconds=600) as box:
        await box.files.write("answer.py", action)
        await box.files.write("check.py", f"{TASK}\ntest_it()\n")
        done = await box.exec("python3 check.py", timeout_seconds=2)
    if done.timed_out:
        return Outcome(0.0, "too slow")
    return Outcome(1.0, "right") if done.exit_code == 0 else Outcome(0.0, "wrong")


async def rollout_or_not(hive: Hive, action: str) -> Outcome:
    """Keep failures that are ours out of what is learnt."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await rollout(hive, action)
        except AshError as error:
            if error.trainable:
                return Outcome(0.0, error.kind)
            if not error.retryable or attempt == ATTEMPTS:
                return Outcome(None, error.kind)
            await anyio.sleep(0.1 * 2**attempt)
    raise AssertionError("unreachable")


async def main(count: int) -> None:
    outcomes: list[Outcome] = []
    limit = anyio.CapacityLimiter(AT_ONCE)
    async with Hive() as hive:

        async def one(action: str) -> None:
            async with limit:
                outcomes.append(await rollout_or_not(hive, action))

        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(one, POLICY[number % len(POLICY)])
    for why, times in sorted(Counter(outcome.why for outcome in outcomes).items()):
        print(f"{why}: {times}")
    learnt = [outcome.reward for outcome in outcomes if outcome.reward is not None]
    print(f"{len(learnt)} of {count} rollouts to learn from, mean reward {sum(learnt) / max(1, len(learnt)):.2f}")


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 8)
