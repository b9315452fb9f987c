"""A tree of files, handled through directory descriptors: walk, copy, compare, measure, remove, sync."""
