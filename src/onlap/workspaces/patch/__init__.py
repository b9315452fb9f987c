"""The difference of two states as a unified diff."""
