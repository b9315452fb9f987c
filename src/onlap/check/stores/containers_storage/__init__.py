"""The store of Podman, Buildah, CRI-O and skopeo: a root of containers/storage with the driver overlay."""

from __future__ import annotations

from onlap.check.stores.containers_storage.store import ContainersStorage, open_store

__all__ = ["ContainersStorage", "open_store"]
