"""The recipe `general`."""
