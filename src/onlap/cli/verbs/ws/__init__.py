"""``onlap ws``: the verbs for workspaces; and ``onlap try``."""
