"""Background work on a root: when it runs, and what it measures, lists and copies."""
