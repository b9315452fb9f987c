"""The verbs of ``onlap docker``."""
