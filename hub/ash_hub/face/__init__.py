"""The MCP server of the hive.

server             MCP requests of both eras, to handlers and lists
legacy_sessions    handshake-era sessions of the SDK
hive_tools         the hive's tools as hosts see them
arguments          what they take
handlers           what they do
results            what they answer
sharing            the one that hands a sandbox to somebody else
snapshots          those that freeze a sandbox and take it back
answer             what any of them gives back
guests             what whoever comes with a share is shown
signatures         tools as one line each
steady_progress    what their callers hear meanwhile
expansion          which sandboxes' tools a list shows, and pages
tool_listing       lists as bytes
fixed_list_hosts   hosts that do not follow changes of the list, and what they are shown
splicing           inserts those bytes into the SDK's answer
notices            notifications of changed lists
"""
