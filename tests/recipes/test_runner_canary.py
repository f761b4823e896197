"""A runner whose network policy must be seen to hold before it is ready."""

from __future__ import annotations

import socket
import time
from collections.abc import Generator
from contextlib import contextmanager

import httpx
import pytest

from ash_recipes.runner.canary import policy_problem
from tests.recipes.runner_parts import ECHO, Runner, running


@contextmanager
def answering(backlog: int = 64) -> Generator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        yield listener


def address_of(listener: socket.socket) -> tuple[str, int]:
    host, port = listener.getsockname()
    return host, port


def status(runner: Runner) -> str:
    """Return the health that the runner tells without a token: it does not wait."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=runner.path, retries=20), base_url="http://runner") as http:
        return http.get("/_ash/health").json()["status"]


def test_a_canary_that_refuses_is_no_problem_and_one_that_answers_is() -> None:
    with answering() as listener:
        found = policy_problem(address_of(listener), seconds=0.2)
        assert found is not None and "network policy is not in force" in found
    assert policy_problem(address_of_closed(), seconds=0.2) is None
    assert policy_problem(None) is None


def address_of_closed() -> tuple[str, int]:
    with answering() as listener:
        return address_of(listener)


def test_a_canary_that_says_nothing_has_been_dropped() -> None:
    with answering(backlog=0) as listener:
        address = address_of(listener)
        waiting = [socket.socket() for _ in range(4)]  # fill its queue: the kernel then lets the rest go unanswered
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        began = time.monotonic()
        assert policy_problem(address, seconds=10) is None
        assert 0.5 < time.monotonic() - began < 5
        for each in waiting:
            each.close()


def test_a_runner_starts_while_its_canary_answers_and_takes_nothing() -> None:
    with answering() as listener:
        host, port = address_of(listener)
        with running(ECHO, config={"canary": f"{host}:{port}"}, ready=False) as runner:
            listener.settimeout(20)
            listener.accept()[0].close()
            with runner.http() as http:
                claim = http.post("/_ash/claim", json={"env": {}, "secrets": {"A": "b"}})
                time.sleep(1.5)  # longer than the recipe takes to start
                assert (claim.status_code, status(runner)) == (503, "starting")
                listener.close()
                assert http.get("/_ash/health").json() == {"status": "ready", "sandbox_id": "sbx-test"}
                claim = http.post("/_ash/claim", json={"env": {}, "secrets": {"A": "b"}})
                assert claim.status_code == 200


@pytest.mark.parametrize("canary", ["", "10.0.0.1", "10.0.0.1:port"])
def test_a_canary_that_is_no_address_is_an_error_of_the_configuration(canary: str) -> None:
    with running(ECHO, config={"canary": canary}, ready=False) as runner:
        assert runner.process.wait(20) == 2
        assert "is not host:port" in runner.log.read_text()
