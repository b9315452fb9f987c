"""OCI and Docker images: in and out, unpacked into snapshots, made of snapshots.

:class:`Images` is what a :class:`onlap.store.Store` has as ``images``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onlap.images.facade import Image as Image
    from onlap.images.facade import Images as Images

__all__ = ["Image", "Images"]


def __getattr__(name: str) -> object:
    # The worker process imports this package for one module of it, and needs no JSON library and no registry.
    if name in __all__:
        from onlap.images import facade

        return getattr(facade, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
