"""`helm upgrade` under load: hubs and routers are replaced, and nobody loses a call or a sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import anyio
import anyio.to_thread
import pytest

from ash_mcp import Hive
from tests.helm.chart import CHART
from tests.helm.cluster import done
from tests.helm.installed import HUBS, ROUTERS, Release, installed, values
from tests.helm.load import Load

pytestmark = [pytest.mark.anyio, pytest.mark.kubernetes, pytest.mark.timeout(300)]

BOXES: Final = 3


def uids(release: Release, selector: str = "", *, namespace: str | None = None) -> set[str]:
    return {pod["metadata"]["uid"] for pod in release.pods(selector, namespace=namespace)}


async def test_an_upgrade_under_load_loses_no_call_and_no_sandbox(
    record_property: Callable[[str, Any], None],
) -> None:
    with installed() as release:
        url, gateway = release.address("ash"), release.address("gateway")
        async with Hive(f"{url}/mcp", token=release.key) as hive:
            boxes = [await hive.spawn("general") for _ in range(BOXES)]
            kept = uids(release, namespace=release.sandboxes)
            load = Load(url, gateway, release.key, [(box.session, box.id) for box in boxes])
            with anyio.fail_after(200):
                async with anyio.create_task_group() as group:
                    group.start_soon(load.run)
                    await load.until_done(5)
                    await anyio.to_thread.run_sync(upgrade, release)
                    await load.until_done(5)
                    load.over.set()
            await load.check()
            record_property("calls done, by kind of client", dict(load.done))
            record_property("asked again, by failure", dict(load.retried))
            assert not load.problems, "\n".join(load.problems[:20])
            assert {info.id for info in await hive.list()} == {box.id for box in boxes}
            assert uids(release, namespace=release.sandboxes) == kept
            for box in boxes:
                await box.destroy()
        assert not release.pods(namespace=release.sandboxes)


def upgrade(release: Release) -> None:
    """Change a setting of hubs and routers, and return once those of before are gone."""
    before = [pod for each in (HUBS, ROUTERS) for pod in release.pods(each)]
    changed = values(release.namespace, hub={"settings": {"log_level": "warning"}})
    release.run("upgrade", str(CHART), "--wait", values=changed)
    names = [f"pod/{pod['metadata']['name']}" for pod in before]
    done("wait", "--for=delete", "--timeout=60s", "--namespace", release.namespace, *names)
    assert len(before) == 3 and not uids(release) & {pod["metadata"]["uid"] for pod in before}
