"""A store served to others: containerd's snapshotter plugin, Docker's graph driver plugin."""
