"""A Docker data root, read without a daemon and checked."""
