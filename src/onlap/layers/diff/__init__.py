"""The changes of a layer, and writing them as an archive."""
