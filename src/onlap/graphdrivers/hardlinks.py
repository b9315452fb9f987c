"""A tree once more, its files hard links of the first: what ``overlay`` makes each image's layer from.

Whoever writes into the copy must never change a file in place, since it is the original's too: not its content, nor
its mode, owner, times or xattrs. :class:`onlap.layers.apply.applier.Applier` does not: what an archive has is always a
new file, and a hard-link entry of an archive only makes a name. (Docker sets mode and owner also after a hard link,
and so changes the parent's file.)
"""

from __future__ import annotations

import errno
import os

from onlap.trees.copy import Copier
from onlap.trees.walk import opened


def link_tree(source: str, target: str) -> None:
    """Make the empty directory ``target`` a copy of ``source``: directories made, everything else linked.

    Raises:
        OSError: it cannot be made.
    """
    with opened(source) as one, opened(target) as other:
        _Linker().tree(one, other)


class _Linker(Copier):
    """A copy whose files are the original's."""

    def _file(
        self, source_dir: int, name: str, target_dir: int, target_name: str, status: os.stat_result, path: str
    ) -> None:
        try:
            os.link(name, target_name, src_dir_fd=source_dir, dst_dir_fd=target_dir, follow_symlinks=False)
        except OSError as error:
            # The filesystem's limit of names for one file is reached (ext4: 65,000); a copy begins a new one.
            if error.errno != errno.EMLINK:
                raise
            super()._file(source_dir, name, target_dir, target_name, status, path)
