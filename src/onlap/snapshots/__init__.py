"""Snapshots: the contract, its implementations, and the language of its filters."""
