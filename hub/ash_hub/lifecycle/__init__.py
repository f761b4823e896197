"""Sandboxes from their spawn to their end.

sandboxes        what callers do: spawn, find, extend, destroy
batches          several sandboxes of one spawn
runs             what owns sandboxes, and ends them with its lease
sharing          shares of sandboxes made, listed and revoked
kept_snapshots   snapshots that the backend has, as callers see them
snapshots        snapshots taken, and sandboxes taken back to them
session_names    names and idempotency keys held in the store
parts            the parts of a hive that the two share
controller       the one place where sandboxes change: a queue, and a turn for each id
observer         what a replica knows of one sandbox
steps            what a turn does
keyed_queue      ids to look at, each held by one worker at a time
decide           what is next for one sandbox, as a table
record           the hive's word on a sandbox, kept by the backend
sandbox          a sandbox as this replica shows it
registry         all that this replica shows
endings          why sandboxes ended, in the store or on disk
siblings         the other replicas
"""
