"""The escape suite in pods, an attempt a test, by runc and by gVisor; `pytest -rP` shows what stopped each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from ash_hub.backends.base import Phase
from ash_hub.testing.conformance import Jail, jail
from ash_hub.testing.escapes import ATTEMPTS, Attempt, Verdict
from ash_mcp.types import Cause
from tests.kubernetes.conftest import RUNTIMES, Cluster, opened, require_class
from tests.kubernetes.known_gaps import GVISOR_GAPS, RUNC_GAPS
from tests.kubernetes.pod_parts import fresh, run_inside, started, under_test

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=RUNTIMES)
async def cell(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Jail]:
    async with opened() as cluster:
        await require_class(cluster.api, request.param)
        async with under_test(cluster, runtime_class=request.param, cpu="500m") as it, jail(it) as made:
            yield made


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
async def test_a_hostile_pod_does_not_get_out(attempt: Attempt, cell: Jail) -> None:
    outcome = await cell.attempt(attempt)
    print(outcome)  # noqa: T201 - the report of the suite
    if outcome.verdict in (Verdict.ABSENT, Verdict.SHARED):
        pytest.skip(str(outcome))
    assert outcome.verdict is Verdict.STOPPED, str(outcome)


def test_gaps_are_of_attempts_that_there_are() -> None:
    assert RUNC_GAPS.keys() | GVISOR_GAPS.keys() <= {attempt.name for attempt in ATTEMPTS}


@pytest.mark.parametrize(
    ("spec", "container", "names"),
    [
        ({"hostPID": True}, {}, ["host processes"]),
        ({"hostIPC": True}, {}, ["shared memory"]),
        ({"volumes": [{"name": "tmp", "emptyDir": None, "hostPath": {"path": "/tmp"}}]}, {}, ["host file"]),
        ({}, {"seccompProfile": {"type": "Unconfined"}}, ["kernel: keyctl"]),
        ({}, {"allowPrivilegeEscalation": True}, ["set-user-id programs"]),
        (
            {},
            {
                "runAsUser": 0,
                "runAsNonRoot": False,
                "readOnlyRootFilesystem": False,
                "capabilities": {"add": ["NET_RAW"]},
            },
            ["write the root", "write the system", "capabilities", "raw packets"],
        ),
    ],
    ids=["processes", "memory segments", "files", "filter", "new privileges", "user"],
)
async def test_what_is_stopped_gets_out_of_a_pod_without_the_protection(
    spec: dict[str, Any], container: dict[str, Any], names: list[str], cluster: Cluster
) -> None:
    weaker = {"pod_spec": spec, "container": {"securityContext": container}}
    async with under_test(cluster, **weaker) as it, jail(it) as cell:
        for attempt in (attempt for attempt in ATTEMPTS if attempt.name in names):
            outcome = await cell.attempt(attempt)
            assert outcome.verdict is Verdict.ESCAPED, str(outcome)


@pytest.mark.heavy  # the kubelet looks at sizes about once a minute
@pytest.mark.timeout(240)
async def test_a_pod_that_fills_its_workspace_is_evicted_and_says_so(cluster: Cluster) -> None:
    async with under_test(cluster, workspace="8Mi") as it:
        specs = [fresh() for _ in range(3)]  # what their status says of it is a matter of luck
        for spec in specs:
            done = await run_inside(
                await started(it.backend, spec), "bash", "-c", "head -c 16M /dev/zero >/workspace/full"
            )
            assert done.code == 0, done.error
        with anyio.fail_after(200):
            for spec in specs:
                while (seen := await it.backend.get(spec.id)) is not None and seen.phase is not Phase.ENDED:
                    await anyio.sleep(0.5)
                assert seen is not None and seen.exit is not None and seen.exit.cause is Cause.LIMIT
                assert seen.exit.message.startswith("evicted by its node: ")
                assert "workspace" in seen.exit.message
