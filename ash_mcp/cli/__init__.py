"""The `ash` command."""
