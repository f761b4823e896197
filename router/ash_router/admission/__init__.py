"""Admission: the principal of a request, and whether it may come in.

base                  what admission is: a head in, a verdict out
gate                  the admission of a hive
host_names            the names by which a hive may be addressed
door_paths            the paths of the doors to one sandbox
request_scope         path, scope and expansion that a request asks for
bearer                bearer tokens of every kind
credential_verdict    what a credential turns out to be
api_keys, oidc, jwks  the two kinds of tokens
secret_tokens         random tokens that are kept as hashes
shares                what opens one sandbox's endpoint to somebody else
share_tokens          the tokens of shares, and their doors
preview_hosts         the hosts under which browsers see ports of shares
tickets               what opens one file to one request
peers                 the user at the other end of a loopback connection
"""
