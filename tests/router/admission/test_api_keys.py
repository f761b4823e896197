"""API keys: made once, kept as hashes, bound, expiring, revoked while a hive runs."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ash_mcp.errors import ConfigError, NotFound
from ash_mcp.types import Principal, PrincipalLimits
from ash_router.admission.api_keys import KEY_PATTERN, KeyDocument, KeyFile, KeyRing
from ash_router.admission.credential_verdict import Known, Rejected


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path, clock: Clock) -> KeyFile:
    return KeyFile(tmp_path / "state" / "keys.json", clock)


def ring(file: KeyFile, clock: Clock) -> KeyRing:
    return KeyRing(file, clock, clock)


def known(verdict: Known | Rejected) -> Known:
    assert isinstance(verdict, Known), verdict
    return verdict


def test_a_key_is_known_by_its_secret_and_by_nothing_else(file: KeyFile, clock: Clock) -> None:
    key, text = file.add(subject="ann")
    keys = ring(file, clock)
    assert KEY_PATTERN.fullmatch(text) is not None
    assert known(keys.verify(text)).principal.subject == "ann"
    assert known(keys.verify(text)).by == f"key:{key.id}"
    other = "a" if text[-1] != "a" else "b"
    for wrong in (text[:-1] + other, text + "a", text.upper(), f"ash_{key.id}_", "ash_", key.sha256, f"{text}\n"):
        assert isinstance(keys.verify(wrong), Rejected)


def test_every_key_is_new_and_an_owner_of_its_own_unless_told(file: KeyFile) -> None:
    made = [file.add() for _ in range(20)]
    assert len({text for _, text in made}) == len({key.subject for key, _ in made}) == 20


def test_the_file_holds_no_secret_and_is_for_its_owner_alone(file: KeyFile) -> None:
    _, text = file.add(name="ci")
    raw = file.path.read_text()
    assert text not in raw and text.split("_")[2] not in raw
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert json.loads(raw)["version"] == 1


def test_a_bound_key_carries_its_scopes(file: KeyFile, clock: Clock) -> None:
    _, text = file.add(scopes=["a", "b", "a"])
    assert known(ring(file, clock).verify(text)).principal.bound_scopes == {"a", "b"}


@pytest.mark.parametrize("scope", ["*", "", "a b", "../x"])
def test_a_key_cannot_be_bound_to_what_is_no_scope(file: KeyFile, scope: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a scope"):
        file.add(scopes=[scope])
    assert file.read() == []


def test_an_expired_key_is_refused_from_that_second_on(file: KeyFile, clock: Clock) -> None:
    _, text = file.add(ttl_seconds=60)
    keys = ring(file, clock)
    clock.now += 59
    assert isinstance(keys.verify(text), Known) and keys.usable() == 1
    clock.now += 1
    assert isinstance(keys.verify(text), Rejected) and keys.usable() == 0


def test_a_revoked_key_is_refused_by_a_hive_that_runs_and_a_new_one_is_taken(file: KeyFile, clock: Clock) -> None:
    key, text = file.add(name="old")
    keys = ring(file, clock)
    assert isinstance(keys.verify(text), Known)
    assert [gone.id for gone in file.revoke(["old"])] == [key.id]
    _, fresh = file.add()
    clock.now += 1.1
    assert isinstance(keys.verify(text), Rejected)
    assert isinstance(keys.verify(fresh), Known)


def test_a_file_that_is_gone_revokes_all(file: KeyFile, clock: Clock) -> None:
    _, text = file.add()
    keys = ring(file, clock)
    file.path.unlink()
    clock.now += 1.1
    assert isinstance(keys.verify(text), Rejected)


def test_a_file_that_is_spoiled_while_a_hive_runs_changes_nothing(
    file: KeyFile, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    _, text = file.add()
    keys = ring(file, clock)
    file.path.write_text("{")
    clock.now += 1.1
    assert isinstance(keys.verify(text), Known)
    assert "as they were before" in caplog.text


def test_a_file_is_read_again_only_when_it_has_changed(
    file: KeyFile, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    _, text = file.add()
    keys = ring(file, clock)
    file.path.write_text("{")
    for _ in range(3):
        clock.now += 1.1
        assert isinstance(keys.verify(text), Known)
    assert caplog.text.count("as they were before") == 1


def test_the_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "a" / "b" / "keys.json")
    before = os.umask(0)
    try:
        file.add()
        file.add()
    finally:
        os.umask(before)
    assert len(file.read()) == 2
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in file.path.parent.iterdir()} == {0o600}


def test_a_folder_that_cannot_be_made_is_said_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(ConfigError, match=r"keys\.json cannot be changed: (File exists|Not a directory)"):
        KeyFile(tmp_path / "state" / "keys.json").add()


def test_a_file_that_cannot_be_read_is_said_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "keys.json").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=r"keys\.json cannot be read: Is a directory"):
        KeyFile(tmp_path / "keys.json").read()


@pytest.mark.parametrize("body", ["", "[]", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{}]}'])
def test_a_file_of_another_shape_stops_the_start(file: KeyFile, clock: Clock, body: str) -> None:
    file.add()
    file.path.write_text(body)
    with pytest.raises(ConfigError, match="move it away"):
        ring(file, clock)


def test_a_file_that_others_can_read_stops_the_start(file: KeyFile, clock: Clock) -> None:
    file.add()
    file.path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        ring(file, clock)


def test_revoking_what_is_unknown_or_ambiguous_revokes_nothing(file: KeyFile) -> None:
    one, _ = file.add(name="twin")
    file.add(name="twin")
    with pytest.raises(NotFound):
        file.revoke([one.id, "nope"])
    with pytest.raises(ConfigError, match="2 keys are named"):
        file.revoke(["twin"])
    assert len(file.read()) == 2


def test_keys_made_at_the_same_time_are_all_kept(file: KeyFile) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(file.add) for _ in range(24)]
    assert {key.id for key in file.read()} == {done.result()[0].id for done in made}
    assert sorted(os.listdir(file.path.parent)) == ["keys.json", "keys.lock"]


def test_keys_of_a_document_are_known_and_revoked_as_it_changes(file: KeyFile, clock: Clock) -> None:
    _, text = file.add(name="old")
    document = KeyDocument(None)
    keys = KeyRing(document, clock, clock)
    assert isinstance(keys.verify(text), Rejected)

    def take(body: bytes | None) -> None:
        document.take(body)
        clock.now += 1.1

    take(file.path.read_bytes())
    assert isinstance(keys.verify(text), Known)
    take(b"{")
    assert isinstance(keys.verify(text), Known)
    file.revoke(["old"])
    take(file.path.read_bytes())
    assert isinstance(keys.verify(text), Rejected)


def test_a_key_carries_its_limits_and_its_spawn_policy_to_its_bearer(file: KeyFile, clock: Clock) -> None:
    limits = PrincipalLimits(calls=3, waiting=0)
    _, text = file.add(subject="ann", limits=limits, spawn_policy='{"cpu":"2"}', scopes=["a"])
    _, plain = file.add(subject="ann")
    keys = ring(file, clock)
    principal = known(keys.verify(text)).principal
    assert principal == Principal("ann", frozenset({"a"}), limits, '{"cpu":"2"}')
    assert known(keys.verify(plain)).principal == Principal("ann")


def test_keys_of_a_file_from_before_keys_had_limits_are_good(file: KeyFile, clock: Clock) -> None:
    _, text = file.add(subject="ann")
    body = json.loads(file.path.read_text())
    for fields in body["keys"]:
        del fields["limits"], fields["spawn_policy"]
    file.path.write_text(json.dumps(body))
    assert known(ring(file, clock).verify(text)).principal == Principal("ann")
