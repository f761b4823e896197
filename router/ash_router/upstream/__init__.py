"""Connections to sandboxes.

pool           new connections to each endpoint, and idle ones kept for reuse
connection     one connection: one request at a time
liveness       hosts that have vanished
call_tokens    the proof that a call comes from the sandbox's own hive
proof          the proof that the sandbox is the one that is meant
inner_ports    how a connection becomes one to a port inside the sandbox
"""
