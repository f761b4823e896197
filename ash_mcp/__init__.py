"""Ash, the Agent Sandbox Hive: the Python SDK."""
