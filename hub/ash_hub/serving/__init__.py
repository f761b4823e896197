"""Listeners, the web app, authentication, logs and metrics.

listeners      the sockets
http_server    an app and a relay on a listener
auth           who may come in, by the settings
web_app        health, readiness, metrics, and `/mcp`
metrics        what `/metrics` shows
audit          one line for each spawn, end and refusal
logs           where the log goes
client_log     one line for each client that connects
log_writers    the threads and files that it goes through
redaction      secrets taken out of text
"""
