"""The helper of a store: a process that mounts without privilege, and starts programs in trees."""
