"""A workspace's changes, merged back into the directory that was captured."""
