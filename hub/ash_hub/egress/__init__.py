"""The egress proxy: what a sandbox's network policy allows goes out through here, and nothing else does.

A process of its own under the keeper, on the standard library alone like it (`python -I -S`), without privileges.
Each sandbox has a listening Unix socket of its own, so that who asks, and under which policy, comes from the socket
and never from what a client says. It is a plain HTTP proxy (absolute-form requests) and a CONNECT proxy.

    names.py      hosts, ports and targets, in their one accepted spelling; no I/O
    addresses.py  which addresses are public, and which are this host's; no I/O
    policy.py     what a policy says of a target and of an address; no I/O
    tls.py        the server name in a ClientHello; no I/O
    http.py       heads of requests and answers, and what is written in their place; no I/O
    refusal.py    why a request is refused, and how that is told; no I/O
    limits.py     what one sandbox may use
    resolver.py   names to addresses; dialling; the addresses of this host
    wire.py       bounded reads and copies between two connections
    exchange.py   one connection of a sandbox, from its head to its end
    proxy.py      one sandbox: accepts, counts, reports
    main.py       the process: control messages in, decisions out

What it does not prevent: a server that is allowed can pass on what it gets, and inside TLS a client can ask an
allowed server for another site that the same server is willing to serve.
"""
