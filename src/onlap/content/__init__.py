"""Blobs by digest: the manifests, configurations and layers of images."""
