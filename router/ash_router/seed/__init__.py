"""The routes of the system that Ash began from, served in the place of its gateway. In the order of one request:

uuid_admission   the uuid in `X-Session-ID` is the credential: where the hash in Redis says that its sandbox is
seed_relay       the relay with these routes and no others
seed_passage     one request to a server that is not ours, with its caller's own headers, and its answer
"""
