"""The recipe `echo`."""
