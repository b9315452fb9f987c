"""The catalog's database: SQLite under many threads, processes and forks."""
