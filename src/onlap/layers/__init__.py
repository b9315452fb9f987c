"""A layer as an archive, and what a layer changed."""
