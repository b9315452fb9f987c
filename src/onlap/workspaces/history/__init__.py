"""The checkpoints of workspaces: made, found, forgotten, merged behind, written to the disk."""
