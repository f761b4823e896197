"""The stdio bridge to a hive: `ash up --stdio`.

stdio_bridge      messages from stdin to the hive and back
stdio             MCP on a process's own stdin and stdout
frames            JSON-RPC messages: kind, era, headers
hive_face         what every hive answers, known without one
list_answers      lists and subscriptions while the hive starts
hive_http         streamable HTTP to the hive
legacy_session    the handshake-era session
background        this user's hive, found or started
"""
