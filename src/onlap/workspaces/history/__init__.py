"""The checkpoints of workspaces: made, found, forgotten, merged into fewer layers, written to the disk."""
