"""The control plane of Ash and its MCP face. Its wings, top to bottom; imports run down this list only.

cli, bench   the commands `ash up`, `ash router`, `ash doctor`, `ash key`, `ash bench`
wrap         `ash wrap`: one MCP server behind walls, without a hive
app, router_alone, seed_router, assembly    a hive, or a router by itself, from its settings to its end
rest         the REST of the system that Ash began from, beside the face
face         the MCP server: the hive's tools, tool lists, news of changes
lifecycle    sandboxes from their spawn to their end, on every replica
testing      the suite that every backend passes, attempts to escape included
spawning     one start: request, policy, recipe, spec, runner, pinned tools
backends     where sandboxes are made
egress       the proxy through which sandboxes go out, a process of its own
serving      listeners, the web app, auth, logs, metrics, audit
settings     the settings of a hive
system       the files of this machine
"""
