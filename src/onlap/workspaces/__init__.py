"""Workspaces: a line of snapshots with one writable top, forked, rolled back and merged back."""
