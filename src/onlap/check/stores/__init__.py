"""The stores of others: containerd's, Docker's, and that of Podman, Buildah and CRI-O; read, checked and repaired."""
