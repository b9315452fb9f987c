"""Blobs by their digest: what the manifests, configurations and layers of images are kept as."""
