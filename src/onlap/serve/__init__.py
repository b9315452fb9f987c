"""Servers: containerd's snapshotter plugin, and Docker's graph driver plugin."""
