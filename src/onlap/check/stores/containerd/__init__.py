"""containerd's root, read without a daemon and checked."""
