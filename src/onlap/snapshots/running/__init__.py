"""Programs in the tree of a snapshot."""
