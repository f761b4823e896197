"""The data plane of Ash. Its wings, from the caller to the sandbox; imports run down this list only.

seed        the routes of the system that Ash began from, in the place of its gateway
caller      the protocol class: heads under limits, admission first, then who answers
dataplane   what all connections of a process share
replicas    which other replicas live, requests forwarded to them, vouchers
calls       which request is a call to a sandbox, and one exchange with it
sessions    the handshake era: which session on the hive has which sessions on sandboxes
upstream    connections to sandboxes, and the tokens that calls carry
routes, ledger, store    which sandbox answers to which name, which calls are in flight, who holds what
admission   who makes a request, and may it come in
bounds      limits, open streams, deadlines
http        legal heads and bodies, event streams, the hive's own responses; no I/O
"""
