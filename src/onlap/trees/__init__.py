"""Trees of files, through directory descriptors: walk, copy, compare, measure, remove."""
