"""Docker's ``overlay``: one lower layer, and so any depth of images.

::

    HOME/<id>/root                          an image: the whole tree, its files hard links of its parent's
    HOME/<id>/{upper,work,merged,lower-id}  a container: what it changed, on the root of the image in lower-id

Docker removed it in version 24. In every layer it costs one inode per directory of the image; use ``overlay2`` unless
you need stacks of more than 128 layers.

Source: moby v23.0.18, daemon/graphdriver/overlay/overlay.go.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from onlap import errors
from onlap.boundary import public_class
from onlap.errors import shown
from onlap.graphdrivers.base import MERGED, WORK, StackDriver
from onlap.graphdrivers.diff.apply import apply_archive
from onlap.graphdrivers.diff.changes import layer_changes
from onlap.graphdrivers.home import STAGING, UNFINISHED, claim, remove_tree
from onlap.graphdrivers.layout import write_file
from onlap.locks import abandoned
from onlap.mounts.plan import Mount, overlay
from onlap.syscalls.files import exists, is_directory
from onlap.trees.copy import Copier, copy_attributes, copy_tree
from onlap.trees.walk import opened

ROOT = "root"
UPPER = "upper"
LOWER_ID = "lower-id"
_NEW_ROOT = STAGING + "root"


@public_class
class OverlayDriver(StackDriver):
    """See the module, and :class:`~onlap.graphdrivers.base.StackDriver` for its arguments."""

    name = "overlay"

    def _check_options(self, options: Sequence[str]) -> None:
        for option in options:
            raise errors.InvalidArgument(f"overlay: unknown option {shown(option.partition('=')[0])}", key=option)

    def _check_storage_options(self, options: Mapping[str, str], *, read_write: bool) -> None:
        if options:
            raise errors.InvalidArgument("--storage-opt is not supported for overlay", hint="leave it out")

    def _build(self, staged: str, id: str, parent: str) -> None:
        if not parent:
            os.mkdir(os.path.join(staged, ROOT))
            self._own(os.path.join(staged, ROOT), 0o755)
            return
        upper, work = os.path.join(staged, UPPER), os.path.join(staged, WORK)
        os.mkdir(upper)
        os.mkdir(work)
        self._own(work, 0o700)
        root = self._path(parent, ROOT)
        if is_directory(root):
            copy_attributes(root, upper)
            lower_id = parent
        else:
            lower_id = self._lower_id(parent)
            # With its markers; a container may run in it, so files may change meanwhile.
            copy_tree(self._path(parent, UPPER), upper, Copier(allow_changes=True, keep_markers=True))
        write_file(os.path.join(staged, LOWER_ID), lower_id, 0o600)

    def _lower_id(self, id: str) -> str:
        """The image below a container's layer.

        Raises:
            DataLoss: it is not recorded, or is missing.
        """
        try:
            with open(self._path(id, LOWER_ID), encoding="utf-8", errors="surrogateescape") as file:
                lower_id = file.read()
        except FileNotFoundError as error:
            raise errors.DataLoss(f"the layer {shown(id)} has neither {ROOT} nor {LOWER_ID}", key=id) from error
        if not is_directory(os.path.join(self._dir(lower_id), ROOT)):
            raise errors.DataLoss(f"the layer {shown(lower_id)} below {shown(id)} is missing", key=id)
        return lower_id

    def _is_image(self, id: str) -> bool:
        return is_directory(self._path(id, ROOT))

    def _is_whole(self, id: str) -> bool:
        return self._is_image(id) or exists(self._path(id, LOWER_ID))

    def _is_empty_on(self, id: str, parent: str) -> bool:
        if not parent:
            return self._is_image(id) and not os.listdir(self._path(id, ROOT))
        if self._is_image(id) or not self._is_whole(id) or not self.exists(parent):
            return False
        if self._is_image(parent):
            return self._lower_id(id) == parent and not os.listdir(self._path(id, UPPER))
        if self._lower_id(id) != self._lower_id(parent):
            return False
        return not layer_changes(self._stack(parent), self._stack(id), self.support.markers)

    def _tree(self, id: str) -> str | Mount:
        if self._is_image(id):
            return self._path(id, ROOT)
        lower = self._path(self._lower_id(id), ROOT)
        return overlay((lower,), upper=self._path(id, UPPER), work=self._path(id, WORK), flags=self.support.flags)

    def _stack(self, id: str) -> list[str]:
        if self._is_image(id):
            return [self._path(id, ROOT)]
        return [self._path(id, UPPER), self._path(self._lower_id(id), ROOT)]

    def apply_diff(self, id: str, parent: str, archive: BinaryIO) -> int:
        """See :meth:`DiffDriver.apply_diff`; the layer becomes an image's."""
        self._existing_stack(id)  # raises
        self._stack_or_none(parent)  # raises
        with self._synced(id):
            if parent and self._is_image(parent) and not self._is_image(id):
                return self._locks.hold(id, lambda: self._apply_on(id, parent, archive))
            return self._naive.apply_diff(id, parent, archive)

    def _apply_on(self, id: str, parent: str, archive: BinaryIO) -> int:
        directory = self._dir(id)
        new = os.path.join(directory, _NEW_ROOT)
        with errors.translated("apply a layer", key=id), opened(directory) as fd:
            remove_tree(fd, directory, _NEW_ROOT)
            with claim(new):
                try:
                    # The applier never changes a parent's file through its link: an entry is always a new file, and
                    # a hard-link entry only adds a name. (Docker also sets mode and owner after a hard link, and so
                    # changes the parent's file.)
                    copy_tree(self._path(parent, ROOT), new, Copier(link=True))
                    size = apply_archive(archive, new, markers=None, ids=self.ids)
                    os.rename(_NEW_ROOT, ROOT, src_dir_fd=fd, dst_dir_fd=fd)
                except BaseException:
                    remove_tree(fd, directory, _NEW_ROOT)
                    raise
            for name in (UPPER, WORK, MERGED, LOWER_ID):
                remove_tree(fd, directory, name)
        return size

    def _sweep(self) -> None:
        super()._sweep()
        for id in os.listdir(self.home):
            directory = self._path(id, "")
            if not exists(directory + _NEW_ROOT):
                continue
            for name in abandoned(directory, UNFINISHED):
                remove_tree(self._home_fd, self.home, os.path.join(id, name))

    def metadata(self, id: str) -> dict[str, str]:
        """See :meth:`ProtoDriver.metadata`."""
        stack = self._existing_stack(id)
        if self._is_image(id):
            return {"RootDir": stack[0]}
        return {
            "LowerDir": stack[1],
            "UpperDir": stack[0],
            "WorkDir": self._path(id, WORK),
            "MergedDir": self._path(id, MERGED),
        }
