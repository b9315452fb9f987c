"""Verbs that run a command: in a tree, in a container, in namespaces."""
