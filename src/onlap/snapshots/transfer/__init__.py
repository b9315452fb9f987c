"""Trees in and out: directories and archives."""
