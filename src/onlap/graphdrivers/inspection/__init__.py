"""A Docker data root, read without a daemon."""
