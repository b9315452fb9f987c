"""The cases of :mod:`onlap.testing.graphdrivers`."""
