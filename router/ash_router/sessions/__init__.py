"""Sessions of the handshake era.

session_gate       who may open a session on the hive, and whose each one is
session_ids        signed ids, from which any replica can open a session anew
session_map        which session on the hive has which sessions on sandboxes
quotas             how many requests of one principal the hive's own endpoint has open
guest_streams      streams that end with the share of their caller
handshakes         sessions on sandboxes opened, tuned and ended
backchannel        what a sandbox says in a session outside of a call
server_requests    what a sandbox asks of the client
"""
