"""How a recipe's MCP server is served: in this process, or bridged from a command."""
