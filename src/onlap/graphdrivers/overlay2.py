"""Docker's ``overlay2``: up to 128 lower layers, mounted natively; on disk as Docker has it (:mod:`.layout`).

Unlike Docker's: layers are given to the kernel as descriptors, so no option string is cut; differences are computed
from the layers themselves, whatever the kernel wrote there (Docker falls back to mounting and walking both trees where
directories may have been renamed); an applied layer is on the disk (``sync``); a layer exists completely or not at all.

Source: moby v26.1.5, daemon/graphdriver/overlay2/overlay.go.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from onlap import errors
from onlap.boundary import public_class
from onlap.errors import shown
from onlap.graphdrivers import layout
from onlap.graphdrivers.base import StackDriver
from onlap.graphdrivers.diff.apply import apply_archive
from onlap.graphdrivers.diff.changes import layer_size
from onlap.graphdrivers.layout import Layer
from onlap.mounts.plan import Mount, overlay
from onlap.syscalls.files import is_directory
from onlap.trees.copy import copy_attributes

_log = logging.getLogger("onlap.graphdrivers")


@public_class
class Overlay2Driver(StackDriver):
    """See the module, and :class:`~onlap.graphdrivers.base.StackDriver` for its arguments."""

    name = "overlay2"
    _reserved = (layout.LINKS,)

    def _check_options(self, options: Sequence[str]) -> None:
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise errors.InvalidArgument(f"the storage option {shown(option)} is not of the form key=value")
            if key.strip().lower() != "overlay2.size":
                raise errors.InvalidArgument(f"overlay2: unknown option {shown(key)}", key=key)
            if value.strip() not in ("", "0"):
                raise _no_quota("overlay2.size")

    def _check_storage_options(self, options: Mapping[str, str], *, read_write: bool) -> None:
        for key in map(str, options):
            if key.lower() != "size":
                raise errors.InvalidArgument(f"Unknown option {shown(key)}", key=key)
            if not read_write:
                raise errors.InvalidArgument("--storage-opt size is only supported for ReadWrite Layers")
            raise _no_quota("--storage-opt size")

    def _build(self, staged: str, id: str, parent: str) -> None:
        diff = os.path.join(staged, layout.DIFF)
        os.mkdir(diff, 0o755)
        if not parent:
            self._own(diff, 0o755)
        else:
            # The merged tree shows this top directory: Docker always makes it root's with mode 0755 and without
            # xattrs, and so loses the image's attributes.
            copy_attributes(Layer(self.home, parent).diff, diff)
            # Before "lower" is read, as in Docker: from now on the parent is mounted read-only.
            with open(os.path.join(self.home, parent, layout.COMMITTED), "wb") as file:
                os.fchmod(file.fileno(), 0o600)
            lower = Layer(self.home, parent).lower_for_child()
            work = os.path.join(staged, layout.WORK)
            os.mkdir(work, 0o700)
            self._own(work, 0o700)
            layout.write_file(os.path.join(staged, layout.LOWER), lower)
        short = layout.new_short()
        layout.write_file(os.path.join(staged, layout.LINK), short)
        # Last, and once its name is in a file: an earlier failure leaves no link, and a later one leaves it findable.
        os.symlink(os.path.join("..", id, layout.DIFF), os.path.join(self.home, layout.LINKS, short))

    def _is_whole(self, id: str) -> bool:
        layer = Layer(self.home, id)
        return layer.short() is not None and is_directory(layer.diff)

    def _is_empty_on(self, id: str, parent: str) -> bool:
        layer = Layer(self.home, id)
        if not self._is_whole(id) or os.listdir(layer.diff):
            return False
        below = layer.lower()
        if not parent:
            return not below
        return bool(below) and below[0] == f"{layout.LINKS}/{Layer(self.home, parent).short()}"

    def _tree(self, id: str) -> str | Mount:
        layer = Layer(self.home, id)
        below = layer.lower()
        if not below:
            return layer.diff
        # As links, although the kernel gets descriptors: with only mount(2), they are short enough for its page.
        lowers = tuple(f"{self.home}/{link}" for link in below)
        flags = self.support.flags
        if layer.is_committed():
            return overlay((layer.diff, *lowers), flags=flags)
        return overlay(lowers, upper=layer.diff, work=f"{layer.path}/{layout.WORK}", flags=flags)

    def _stack(self, id: str) -> list[str]:
        layer = Layer(self.home, id)
        return [layer.diff, *layer.lower_directories()]

    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        """See :meth:`DiffDriver.apply_diff`."""
        stack = self._existing_stack(id)
        with self._synced(id):
            if not self.support.native_diff or self._stack_or_none(parent) != stack[1:]:
                return self._naive.apply_diff(id, parent, archive)
            apply_archive(archive, stack[0], lowers=stack[1:], markers=self.support.markers, ids=self.ids)
            return layer_size(stack[0])

    def metadata(self, id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.metadata`."""
        stack = self._existing_stack(id)
        layer = Layer(self.home, id)
        found = {
            "WorkDir": os.path.join(layer.path, layout.WORK),
            "MergedDir": os.path.join(layer.path, layout.MERGED),
            "UpperDir": layer.diff,
        }
        if stack[1:]:
            found["LowerDir"] = ":".join(stack[1:])
        return found

    def _discard(self, staged: str) -> None:
        self._unlink(staged)
        super()._discard(staged)

    def _unlink(self, id: str) -> None:
        """Remove the link to a layer, if it has one."""
        short = Layer(self.home, id).short()
        if short is None:
            return
        try:
            os.unlink(os.path.join(self.home, layout.LINKS, short))
        except FileNotFoundError:
            pass  # it was not made yet, or was removed earlier
        except OSError as error:
            raise errors.from_oserror(error, doing="remove the layer's link", key=id) from error

    def _sweep(self) -> None:
        super()._sweep()
        layout.unlink_dangling(self.home)
        with errors.translated("make the short links", key=self.home):
            made = layout.relink(self.home)
            os.chmod(os.path.join(self.home, layout.LINKS), 0o700)
        if made:
            _log.warning("restored lost links", extra={"fields": {"links": " ".join(made)}})


def _no_quota(option: str) -> errors.Unimplemented:
    return errors.Unimplemented(
        f"{option} is not supported: it needs project quotas of the filesystem, which Onlap does not set",
        key=option,
        hint="leave it out, or limit the whole data root with a filesystem of its own",
    )
