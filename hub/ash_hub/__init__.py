"""The control plane of Ash and its MCP face."""
