"""The main job on a real tree: what ``onlap demo`` does."""
