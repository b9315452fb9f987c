"""Differences between layers of graph drivers, and layers applied."""
