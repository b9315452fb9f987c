"""The verbs of ``onlap image``."""
