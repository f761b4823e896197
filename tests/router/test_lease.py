"""Leases against a model: whatever the order of steps and times, one holder at a time and tokens that only grow."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ash_mcp.errors import LeaseHeld, LeaseLost
from ash_router import _lease
from ash_router.store.base import Lease

HOLDERS = st.sampled_from(["a", "b", "c"])
TTLS = st.sampled_from([0.5, 1.0, 3.0])


class LeaseMachine(RuleBasedStateMachine):
    """Some holders, each with the lease that it was last given, and a resource that checks fencing tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.last: Lease | None = None
        self.given: dict[str, Lease] = {}
        self.highest_token = 0

    def holds(self, lease: Lease) -> bool:
        return _lease.held_by(self.last, lease, self.now)

    @rule(holder=HOLDERS, ttl=TTLS)
    def grant(self, holder: str, ttl: float) -> None:
        before = self.last
        is_free = before is None or before.expires_at <= self.now
        try:
            lease = _lease.grant(before, "name", holder, ttl, self.now)
        except LeaseHeld as held:
            assert before is not None and not is_free
            assert held.data["holder"] == before.holder != holder
            return
        assert lease.expires_at >= self.now + ttl
        if is_free:
            assert lease.token == self.highest_token + 1
        else:
            assert before is not None
            assert (lease.holder, lease.token) == (before.holder, before.token)
            assert lease.expires_at >= before.expires_at
        self.last = self.given[holder] = lease
        self.highest_token = lease.token

    @rule(holder=HOLDERS, ttl=TTLS)
    def renew(self, holder: str, ttl: float) -> None:
        lease = self.given.get(holder)
        if lease is None:
            return
        held = self.holds(lease)
        try:
            renewed = _lease.renew(self.last, lease, ttl, self.now)
        except LeaseLost:
            assert not held
            return
        assert held
        assert renewed.token == lease.token
        assert renewed.expires_at >= max(lease.expires_at, self.now + ttl)
        self.last = self.given[holder] = renewed

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def one_holder_at_most(self) -> None:
        holding = [lease for lease in self.given.values() if self.holds(lease)]
        assert len(holding) <= 1
        assert all(lease.token == self.highest_token for lease in holding)


LeaseMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestLeases = LeaseMachine.TestCase


def test_a_lease_is_over_at_its_expiry_and_not_after_it():
    lease = _lease.grant(None, "name", "a", 1.0, 10.0)
    assert _lease.held_by(lease, lease, 10.999)
    assert not _lease.held_by(lease, lease, 11.0)
    assert _lease.grant(lease, "name", "b", 1.0, 11.0).token == 2
