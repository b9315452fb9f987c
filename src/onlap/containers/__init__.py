"""A command in the tree of a snapshot or an image, by an OCI runtime."""
