"""The commands of `ash` that need a hive's own code: `up`. Found by the entry points `ash.commands`."""
