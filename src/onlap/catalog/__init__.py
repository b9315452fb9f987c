"""ROOT: where it keeps what, its records in SQLite, its locks, pins, staging and trash.

Nothing here knows what kind of snapshotter uses it.
"""
