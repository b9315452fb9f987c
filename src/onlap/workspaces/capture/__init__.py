"""A directory as a committed snapshot: all of it at first, then what changed since the last time."""
