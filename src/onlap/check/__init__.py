"""Checks a root against what it should hold, repairs it, and rebuilds a lost catalog."""
