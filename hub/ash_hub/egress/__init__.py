"""The egress proxy: what a sandbox's network policy allows goes out through here, and nothing else does.

A process of its own, on the standard library alone (`python -I -S`), without privileges; started by whichever backend
needs it. On one machine each sandbox has a listening socket of its own, so that who asks, and under which policy,
comes from the socket; on a cluster, from a token that the runner sends first and from the pod's address. It is a plain
HTTP proxy (absolute-form requests) and a CONNECT proxy.

    names.py      hosts, ports and targets, in their one accepted spelling; no I/O
    addresses.py  which addresses are public, and which are this host's; no I/O
    policy.py     what a policy says of a target and of an address; no I/O
    tls.py        the server name in a ClientHello; no I/O
    http.py       heads of requests and answers, and what is written in their place; no I/O
    refusal.py    why a request is refused, and how that is told; no I/O
    limits.py     what one sandbox may use
    lease.py      how long a policy that was asked for may be acted on
    signing.py    lines between proxies and a hive, signed; what proves a sandbox to a proxy; no I/O
    capacity.py   what all sandboxes may use together, and who is next
    resolver.py   looks names up, connects, knows the addresses of this host
    wire.py       bounded reads and copies between two connections
    audit.py      reports of decisions, at a bounded rate
    exchange.py   one connection of a sandbox, from its head to its end
    proxy.py      one sandbox: accepts, counts, reports
    privileges.py what the process gives up before it serves
    main.py       the proxy as a child process: control messages in, decisions out
    starting.py   the commands that start it
    standalone.py the proxy by itself: a configuration in, decisions to standard output
    connected_sandboxes.py  the sandboxes of such a proxy on a cluster, and their policies, fetched from the hive
    shared.py     such a proxy by itself, as in a cluster: one listener for many sandboxes

What it does not prevent: a server that is allowed can pass on what it gets, and inside TLS a client can ask an
allowed server for another site that the same server is willing to serve.
"""
