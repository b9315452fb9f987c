"""Differences between the layers of graph drivers, and applying them."""
