"""Layers and records of other stores, repaired."""
