"""Parts of the tests of pods: a backend in a namespace of its own, and a stand-in for the runner."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from ash_hub.backends.base import Backend, Instance, Phase
from ash_hub.backends.kubernetes.backend import KubernetesBackend
from ash_hub.backends.kubernetes.settings import KubernetesSettings
from ash_hub.testing.conformance import BackendUnderTest
from ash_hub.testing.escapes import Prison
from ash_mcp.quantities import cpu_quantity, memory_quantity
from ash_mcp.types import SandboxId, SandboxSpec, new_sandbox_id
from tests.hive_process import hive_in
from tests.hub.backends.local.local_parts import MIB, STAND_IN, Done, memory_of
from tests.kubernetes.conftest import Cluster
from tests.kubernetes.known_gaps import GVISOR_GAPS, RUNC_GAPS

IMAGE: Final = os.environ.get("ASH_TEST_IMAGE", "localhost/ash/recipes:dev")
PYTHON: Final = "/opt/ash/bin/python"
SPEC: Final = SandboxSpec(id=SandboxId("sbx-unused"), recipe="stand-in", server={"python": "none:none"}, key="k")
_GREETER: Final = """
import socket, threading
def greet(listener):
    while True: listener.accept()[0].close()
for port in ports:
    threading.Thread(target=greet, args=(socket.create_server(("0.0.0.0", port)),), daemon=True).start()
"""
_PROGRAM: Final = f"""
import os, signal, socket, threading
from ash_recipes.runner.own_memory import close_memory
close_memory()
def end(*_): os._exit(0)
signal.signal(signal.SIGTERM, end)
# Python runs a handler in its main thread alone, which may be about to wait for a connection
told, tell = os.pipe()
os.set_blocking(tell, False)
signal.set_wakeup_fd(tell)
threading.Thread(target=lambda: end(os.read(told, 1)), daemon=True).start()
os.environ["ASH_LISTEN_FD"] = str(socket.create_server(("0.0.0.0", 8421)).detach())
{STAND_IN}"""


def listening_on(*ports: int) -> list[str]:
    """Return the command of a pod of the stand-in that listens on more ports than the sandboxes'."""
    return [PYTHON, "-c", f"ports = {ports!r}\n{_GREETER}\n{_PROGRAM}"]


def fresh(**change: Any) -> SandboxSpec:
    return replace(SPEC, id=new_sandbox_id(), **change)


def settings_of(cluster: Cluster, **more: Any) -> KubernetesSettings:
    """Return settings by which each pod runs the stand-in, or the `command` given.

    `pod_spec` and `container` are what the template says beside that.
    """
    command = more.pop("command", listening_on())
    container = {"name": "sandbox", "command": command, **more.pop("container", {})}
    template = {"spec": {"containers": [container], **more.pop("pod_spec", {})}}
    given: dict[str, Any] = {
        "kubeconfig": Path(os.environ["ASH_TEST_KUBECONFIG"]),
        "namespace": cluster.namespace,
        "hive": f"h{secrets.token_hex(4)}",
        "image": IMAGE,
        "pod_template": template,
        "cpu_request": "10m",
        "memory_request": "32Mi",
        "memory": "256Mi",
    }
    return KubernetesSettings.model_validate(given | more)


def environment_of(cluster: Cluster) -> dict[str, str]:
    """Return the environment of a hive on the cluster, whose pods run the runner itself."""
    return {
        "ASH_HUB_BACKEND__KIND": "kubernetes",
        "ASH_HUB_BACKEND__KUBECONFIG": os.environ["ASH_TEST_KUBECONFIG"],
        "ASH_HUB_BACKEND__NAMESPACE": cluster.namespace,
        "ASH_HUB_BACKEND__IMAGE": IMAGE,
        "ASH_HUB_BACKEND__CPU_REQUEST": "10m",
        "ASH_HUB_BACKEND__MEMORY_REQUEST": "64Mi",
    }


@asynccontextmanager
async def serving(home: Path) -> AsyncGenerator[str]:
    """Give the URL of a hive by this process's environment, as one on another machine would be."""
    hive = hive_in(home)
    url, _ = await anyio.to_thread.run_sync(hive.__enter__)
    try:
        yield url
    finally:
        await anyio.to_thread.run_sync(hive.__exit__, None, None, None)


async def run_inside(instance: Instance, *command: str, seconds: float = 30.0) -> Done:
    """Run a command in a sandbox of the stand-in."""
    assert instance.endpoint is not None
    with anyio.fail_after(seconds):
        while True:
            try:
                reader, writer = await asyncio.open_connection(instance.endpoint.host, instance.endpoint.port)
                break
            except ConnectionRefusedError:  # its container runs, and the program in it is about to listen
                await anyio.sleep(0.05)
        with closing(writer):
            writer.write(json.dumps(command).encode() + b"\n")
            data = await reader.read()
    return Done(**json.loads(data))


def prison_of(settings: KubernetesSettings) -> Prison:
    """Return what attempts to escape need to know of pods by these settings.

    How many processes, open files and inodes a pod may have is the kubelet's and the container runtime's to say, and
    the sizes of its places are held to by eviction, so that none of them is a bound.
    """

    async def run(instance: Instance, command: Sequence[str]) -> Done:
        return await run_inside(instance, *command, seconds=60)

    bounds: dict[str, Any] = {
        "read_only_system": True,
        "one_user": True,
        "memory_bytes": memory_quantity(settings.memory),
        "cpu": cpu_quantity(settings.cpu),
        "own_files": True,
        "own_devices": True,
        "hive_bytes": 8 * MIB,
    }
    if settings.runtime_class == "gvisor":
        gaps = GVISOR_GAPS
    else:
        gaps = RUNC_GAPS
        bounds["kernel"] = ["EPERM", "EACCES"]  # without capabilities the kernel itself says so
        bounds["places"] = {"/dev/shm": 64 * MIB}  # by gVisor it is memory like any other
    return Prison(
        run=run,
        bounds=bounds,
        serve=lambda spec, program: replace(spec, env={"STAND_IN": program}),
        hive_bytes=lambda: memory_of(os.getpid()),
        lacks=gaps,
    )


async def started(backend: Backend, spec: SandboxSpec) -> Instance:
    """Make a sandbox and return it once it runs."""
    events = backend.watch()
    made = await backend.create(spec)
    with anyio.fail_after(30):
        while made.phase is Phase.STARTING:
            event = await anext(events)
            if event.instance is not None and event.instance.id == spec.id:
                made = event.instance
    assert made.phase is Phase.RUNNING, made.exit
    return made


@asynccontextmanager
async def under_test(cluster: Cluster, **more: Any) -> AsyncGenerator[BackendUnderTest]:
    """Enter a backend of a hive of its own. Nothing of it may be left at the end."""
    settings = settings_of(cluster, **more)
    collections = [f"/api/v1/namespaces/{cluster.namespace}/{kind}" for kind in ("pods", "configmaps", "secrets")]

    async def left() -> Sequence[str]:
        found = [await cluster.api.get(path, labelSelector=f"ash/hive={settings.hive}") for path in collections]
        names = [str(each["metadata"]["name"]) for page in found if page is not None for each in page["items"]]
        return [name for name in names if name != f"ash-{settings.hive}-keys-egress"]  # the hive's, not a sandbox's

    async with KubernetesBackend(settings) as backend:

        async def die(sandbox_id: SandboxId) -> None:
            instance = await backend.get(sandbox_id)
            assert instance is not None
            with suppress(ConnectionError, ValueError):  # it may be gone before it can answer
                await run_inside(instance, "kill", "-TERM", "1")

        yield BackendUnderTest(
            backend=backend,
            spec=SPEC,
            fail=lambda spec: replace(spec, image="localhost/ash/nothing:here"),
            die=die,
            another=lambda: KubernetesBackend(settings),
            leftovers=left,
            death_seconds=5.0,
            changes_networks=settings.internet_by_proxy,
            prison=prison_of(settings),
        )
        for instance in await backend.list():
            await backend.delete(instance.id, grace_seconds=0)
