"""The tree of a workspace: mounted, and commands in it."""
