"""ROOT: its layout, its records in SQLite, its locks, pins, staging and trash.

Nothing here depends on the kind of snapshotter that uses it.
"""
