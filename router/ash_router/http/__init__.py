"""HTTP as the relay reads and writes it. No I/O.

framing         which heads are legal, and how messages are framed anew
heads           what is known of a head, and heads that come again
websocket       the handshake of a WebSocket
bodies          JSON-RPC messages read and rewritten in place
event_stream    streams cut at the ends of their events
responses       what the hive itself answers
"""
