"""Registries: how to reach them and log in, pulls and pushes."""
