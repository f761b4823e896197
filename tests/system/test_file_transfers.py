"""Files of a real hive's sandboxes by plain curl and the SDK: any length, cut transfers, tickets, copies."""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from ash_mcp import Hive, Sandbox, errors
from tests.system.owners import Two, open_two

pytestmark = [pytest.mark.anyio, pytest.mark.heavy]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def two() -> AsyncGenerator[Two]:
    async with open_two() as two:
        yield two


@pytest.fixture(scope="module")
async def hive(two: Two) -> AsyncGenerator[Hive]:
    async with Hive(two.hive.url, two.ann.token) as hive:
        yield hive


@pytest.fixture
async def box(hive: Hive) -> AsyncGenerator[Sandbox]:
    async with hive.spawn("echo") as box:
        yield box


async def curl(*words: str, stdin: bytes = b"") -> tuple[int, bytes]:
    """Run curl and return the status of the answer and its body."""
    command = ["curl", "-sS", "--path-as-is", "-w", "\n%{http_code}", *words]
    done = await anyio.run_process(command, input=stdin, check=False)
    body, _, status = done.stdout.rpartition(b"\n")
    return int(status), body


def door(two: Two, box: Sandbox, path: str) -> str:
    return f"{two.hive.url.removesuffix('/mcp')}/s/{box.id}/files/{path}"


async def test_curl_moves_files_with_a_key_and_nothing_else(two: Two, box: Sandbox, tmp_path: Path):
    data = os.urandom(3_000_000)
    (tmp_path / "data").write_bytes(data)
    key, url = f"Authorization: Bearer {two.ann.token}", door(two, box, "a%20b/data")
    assert await curl("-H", key, "-T", str(tmp_path / "data"), url) == (201, b'{"bytes": 3000000}')
    assert await curl("-H", key, url) == (200, data)
    assert await curl("-H", key, "-r", "5-9", url) == (206, data[5:10])
    assert (await curl("-H", key, "-I", url))[0] == 200
    status, listed = await curl("-H", key, door(two, box, "a%20b/"))
    assert (status, json.loads(listed)["name"]) == (200, "data")
    assert (await curl("-H", key, "-X", "DELETE", url))[0] == 204
    assert (await curl("-H", key, url))[0] == 404
    for bad in ("", f"Authorization: Bearer {two.bob.token}"):
        assert (await curl("-H", bad, url))[0] == 404, "there is no such sandbox for them"


async def test_a_cut_upload_leaves_the_old_file(two: Two, box: Sandbox):
    await box.files.write("f", "old")
    host, port = two.hive.url.split("/")[2].split(":")
    head = f"PUT /s/{box.id}/files/f HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {two.ann.token}\r\n"
    async with await anyio.connect_tcp(host, int(port)) as stream:
        await stream.send(f"{head}Content-Length: 9000000\r\n\r\n".encode() + bytes(5_000_000))
    with anyio.fail_after(10):
        while [entry.name for entry in await box.files.list()] != ["f"]:
            await anyio.sleep(0.05)
    assert await box.files.read("f") == "old"


async def test_a_download_whose_sandbox_ends_is_cut_off(two: Two, hive: Hive):
    box = await hive.spawn("echo")
    await box.exec("head -c 200000000 /dev/zero > f", check=True)
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {two.ann.token}"}) as http:
        with pytest.raises(httpx.RemoteProtocolError):
            async with http.stream("GET", door(two, box, "f")) as answer:
                assert answer.headers["content-length"] == "200000000"
                await box.destroy()
                async for _ in answer.aiter_raw():
                    pass


async def ask(two: Two, tool: str, **arguments: Any) -> dict[str, Any]:
    made = await two.ann.call(tool, arguments)
    assert not made.result.get("isError"), made.body
    return made.result["structuredContent"]


async def test_a_ticket_moves_a_file_without_any_other_credential(two: Two, box: Sandbox, tmp_path: Path):
    (tmp_path / "in").write_bytes(b"hello")
    up = await ask(two, "upload_url", session=box.session, path="x y/in.txt", ttl_seconds=60)
    assert (up["method"], up["bytes"]) == ("PUT", None)
    assert await curl("-T", str(tmp_path / "in"), up["url"]) == (201, b'{"bytes": 5}')
    down = await ask(two, "download_url", session=box.session, path="x y/in.txt")
    assert (down["method"], down["bytes"], down["media_type"]) == ("GET", 5, "text/plain")
    assert await curl(down["url"]) == (200, b"hello")
    for used in (("-T", str(tmp_path / "in"), up["url"]), (down["url"],)):
        status, said = await curl(*used)
        assert status == 401 and b"was used" in said
    assert await box.files.read("x y/in.txt") == "hello"


async def test_a_ticket_takes_no_more_than_it_says(two: Two, box: Sandbox):
    for announced in (True, False):
        up = await ask(two, "upload_url", session=box.id, path="f", max_bytes=3)
        more = () if announced else ("-H", "Transfer-Encoding: chunked")
        assert (await curl("-X", "PUT", "--data-binary", "four", *more, up["url"]))[0] == 413
    assert await box.files.list() == []


async def test_of_many_who_use_a_ticket_at_once_one_does(two: Two, box: Sandbox):
    await box.files.write("f", "x")
    down = await ask(two, "download_url", session=box.id, path="/workspace/f")
    got: list[int] = []

    async def use() -> None:
        async with httpx.AsyncClient() as http:
            got.append((await http.get(down["url"])).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(use)
    assert sorted(got) == [200] + [401] * 19


async def test_a_folder_goes_by_tickets_as_an_archive(two: Two, box: Sandbox, tmp_path: Path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "f").write_text("x")
    packed = (await anyio.run_process(["tar", "-C", str(tmp_path / "tree"), "-cf", "-", "."])).stdout
    up = await ask(two, "upload_url", session=box.id, path="tree/")
    assert (await curl("-T", "-", up["url"], stdin=packed))[0] == 200
    down = await ask(two, "download_url", session=box.id, path="tree/")
    assert (down["bytes"], down["media_type"]) == (None, "application/x-tar")
    _, archive = await curl(down["url"])
    assert (await anyio.run_process(["tar", "-tf", "-"], input=archive)).stdout == b"f\n"


async def test_no_log_and_no_sandbox_sees_a_ticket(two: Two, box: Sandbox, caplog: pytest.LogCaptureFixture):
    await box.files.write("f", "x")
    with caplog.at_level("DEBUG"):
        down = await ask(two, "download_url", session=box.id, path="f")
        await curl(down["url"])
        await curl(down["url"])
    found = re.search(r"ticket=(asht_[a-z2-7]{10})_([a-z2-7]+)", down["url"])
    assert found is not None
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("ash")]
    assert not any(found[2] in line for line in ours) and found[2] not in await box.logs()
    audited = [json.loads(record.getMessage()) for record in caplog.records if record.name == "ash.audit"]
    assert any(line["event"] == "ticket" and f"asht_{line['ticket']}" == found[1] for line in audited)


@pytest.mark.parametrize("path", ["nothing", "folder", "../../nothing"])
async def test_a_ticket_is_only_made_for_what_can_be_read(two: Two, box: Sandbox, path: str):
    await box.files.mkdir("folder")
    made = await two.ann.call("download_url", {"session": box.id, "path": path})
    assert made.result["isError"] and "could not be read" in made.body


async def test_files_and_folders_are_copied_between_sandboxes_of_one_owner(two: Two, hive: Hive, box: Sandbox):
    async with hive.spawn("echo") as other:
        await box.exec("mkdir -p d/e && head -c 30000000 /dev/urandom > d/large && echo x > d/e/f", check=True)
        done = await ask(
            two, "copy", from_session=box.id, from_path="d/large", to_session=other.session, to_path="/tmp/large"
        )
        assert done["bytes"] == 30_000_000
        await ask(two, "copy", from_session=box.id, from_path="d/", to_session=other.id, to_path="new/d/")
        sums = [(await it.exec("md5sum < " + path)).stdout for it, path in ((box, "d/large"), (other, "/tmp/large"))]
        assert sums[0] == sums[1] and await other.files.read("new/d/e/f") == "x\n"
        for more, said in (
            ({"from_path": "nothing"}, "could not be read"),
            ({"to_path": "/proc/x"}, "could not be written"),
            ({"to_path": "d/"}, "end both paths"),
            ({"from_session": "bobsprey"}, "no sandbox"),
            ({"to_session": "bobsprey"}, "no sandbox"),
        ):
            asked = {"from_session": box.id, "from_path": "d/large", "to_session": other.id, "to_path": "x", **more}
            failed = await two.ann.call("copy", asked)
            assert failed.result["isError"] and said in failed.body, failed.body


async def test_a_long_result_is_read_by_the_link_that_stands_in_its_place(two: Two, hive: Hive):
    text = "0123456789" * 2000
    async with hive.spawn("echo", result_bytes=8192) as box:
        named = {"session": box.session}
        made = await two.ann.call("call", {**named, "tool": "echo", "arguments": {"text": text}})
        links = [block for block in made.result["content"] if block["type"] == "resource_link"]
        assert len(json.dumps(made.result)) < 8192
        assert made.result["structuredContent"]["text"][:100] == text[:100]
        read = [await two.ann.call("read_resource", {**named, "uri": link["uri"]}) for link in links]
        wholes = [json.loads(each.result["structuredContent"]["contents"][0]["text"]) for each in read]
        assert wholes == [{"text": text}] * 2
        assert {link["mimeType"] for link in links} == {"text/plain", "application/json"}
        path = links[0]["uri"].removeprefix(f"sandbox://{box.id}/")
        down = (await two.ann.call("download_url", {**named, "path": path})).result
        status, whole = await curl(down["structuredContent"]["url"])
        assert (status, json.loads(whole)) == (200, {"text": text})
    async with hive.spawn("echo") as box:
        assert (await box.call("echo", text=text)).structured == {"text": text}


async def test_a_guest_moves_no_files(two: Two, box: Sandbox):
    share = await box.share()
    await box.files.write("f", "x")
    status, said = await curl("-H", f"Authorization: Bearer {share.token}", door(two, box, "f"))
    assert status == 403 and b"nothing else here" in said
    async with Hive(two.hive.url, share.token) as guest:
        with pytest.raises(errors.AshError):
            await (await guest.attach(box.id)).files.download("f", "/dev/null")
