"""What this kernel and a directory can do, found by trial with the functions that Onlap mounts with."""
