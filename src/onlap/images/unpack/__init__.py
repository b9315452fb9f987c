"""Layers of images become snapshots."""
