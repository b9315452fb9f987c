"""OCI and Docker images: in and out, unpacked into snapshots, made of snapshots.

:class:`Images` is what a :class:`onlap.store.Store` has as ``images``; :class:`Access` says how registries are reached.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onlap.images.api import Images as Images
    from onlap.images.index import Image as Image
    from onlap.images.registry.access import Access as Access
    from onlap.images.registry.access import Proxies as Proxies
    from onlap.images.registry.credentials import Credentials as Credentials
    from onlap.images.registry.credentials import Login as Login

_HOMES = {
    "Access": "registry.access",
    "Credentials": "registry.credentials",
    "Image": "index",
    "Images": "api",
    "Login": "registry.credentials",
    "Proxies": "registry.access",
}

__all__ = ["Access", "Credentials", "Image", "Images", "Login", "Proxies"]


def __getattr__(name: str) -> object:
    # The worker process imports this package for one module of it, and needs no JSON library and no registry.
    if name in _HOMES:
        return getattr(import_module(f"onlap.images.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
