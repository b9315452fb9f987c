"""OCI and Docker images: pulled, pushed, imported, exported, unpacked into snapshots, made from snapshots.

:class:`Images` is the attribute ``images`` of a :class:`onlap.store.Store`; :class:`Access` says how to reach a
registry.
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
    # A worker process imports this package for one module of it, and needs neither msgspec nor a registry's client.
    if name in _HOMES:
        return getattr(import_module(f"onlap.images.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
