"""The other replicas of the hive.

membership    which of them live, and where each is reached
forwarding    requests of sessions that live on another replica
vouchers      what a replica says of a forwarded request's caller
"""
