"""Workspaces: a file tree that is forked, checkpointed, rolled back and merged."""
