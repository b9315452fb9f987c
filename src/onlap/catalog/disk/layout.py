"""ROOT on disk: its layout, and the checks before it is used.

::

    ROOT/                     0700, owned by us
      catalog.db              SQLite; only SQLite opens it
      catalog.lock            flock: all writes and checkpoints, of all processes
      staging/<process>/<n>   trees being built; the process holds its directory's flock
      snapshots/<id>/fs       the tree; the upperdir while active
      snapshots/<id>/work     the workdir, while active
      snapshots/<id>/about/record     a copy of its record (onlap.catalog.background.sidecars)
      snapshots/<id>/about/manifest   what a committed layer holds (onlap.catalog.background.manifests)
      snapshots/<id>/about/captured   what the captured directory looked like (onlap.workspaces.capture)
      snapshots/<id>/about/live       a symlink to a directory of others that is the layer below (likewise)
      snapshots/<id>/about/damaged    what a repair took out of the tree, or all of it (onlap.check)
      trash/<id>              removed trees, deleted later
      empty                   0755, never written: a lower layer where the kernel wants one
      reserve, reserve.<n>    1 MiB and some inodes, freed when a remove meets a full disk
      content/blobs/sha256/   blobs of images
      content/images.json     a copy of the names of the images
      content/ingest/         blobs being fetched
      runs/<id>               what belongs to a running program, held by its flock (onlap.catalog.runs)
      unrecorded/<id>         trees that no usable record belonged to when the catalog was rebuilt (onlap.check.rebuild)
      catalog.db.damaged-*    the catalog before that
      restore.partial/        a root that is being restored, held by its flock; catalog.db leaves it last
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time

from onlap import errors
from onlap.arguments import check_path
from onlap.errors import shown
from onlap.syscalls.files import BTRFS, exists, filesystem_magic, is_directory
from onlap.trees.meta import drop_acls

# SQLite's DELETE fails on a full disk, where rename still works; it needs a few pages of the write-ahead log, and 1 MiB
# is hundreds of them.
RESERVE_SIZE = 1 << 20
# SQLite creates two files when it opens the catalog, its log and its shared memory; with one to spare for each.
RESERVE_INODES = 4
# Btrfs keeps metadata apart from data. Without space for metadata nothing can be created or renamed, and a transaction
# reserves far more than it uses in the end: 256 KiB per item (fs/btrfs/fs.h, btrfs_calc_insert_metadata_size). So the
# reserve has extended attributes there, which are metadata.
RESERVE_METADATA = 4 << 20
_ATTRIBUTE_SIZE = 3500  # fits into a node of any size


# What is written beside a snapshot's tree after it was built is written below this directory, which is made with the
# tree: the times of the directory above say when the tree was complete, and a rebase and a diff of copies rely on them.
ABOUT = "about"
# Beside a snapshot's tree: what of it was damaged.
QUARANTINE = f"{ABOUT}/damaged"
# Trees that no usable record belonged to when the catalog was rebuilt; no cleanup comes there.
UNRECORDED = "unrecorded"


def dated_name() -> str:
    """A name that nothing has yet: the present time (UTC), and a random number."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(3).hex()}"


class Layout:
    """The paths below one root.

    Args:
        root: its path; made absolute.
    """

    __slots__ = ("content", "database", "empty", "lock", "reserve", "root", "snapshots", "staging", "trash")

    def __init__(self, root: str | os.PathLike[str]) -> None:
        # The directories above may be reached through symlinks; mountinfo shows the real paths of our trees.
        above, name = os.path.split(os.path.abspath(check_path(root, "path of the root")))
        self.root = os.path.join(os.path.realpath(above), name)
        self.database = self._place("catalog.db")
        self.lock = self._place("catalog.lock")
        self.staging = self._place("staging")
        self.snapshots = self._place("snapshots")
        self.trash = self._place("trash")
        self.empty = self._place("empty")
        self.reserve = self._place("reserve")
        self.content = self._place("content")

    def _place(self, name: str) -> str:
        return os.path.join(self.root, name)

    def snapshot(self, identifier: int) -> str:
        """The directory of a snapshot."""
        return f"{self.snapshots}/{identifier}"

    def tree(self, identifier: int) -> str:
        """A snapshot's tree."""
        return f"{self.snapshots}/{identifier}/fs"

    def work(self, identifier: int) -> str:
        """A snapshot's workdir."""
        return f"{self.snapshots}/{identifier}/work"

    def record(self, identifier: int) -> str:
        """The copy of a snapshot's record."""
        return f"{self.snapshots}/{identifier}/{ABOUT}/record"

    def manifest(self, identifier: int) -> str:
        """What a committed snapshot's layer holds."""
        return f"{self.snapshots}/{identifier}/{ABOUT}/manifest"

    def live(self, identifier: int) -> str:
        """A symlink to the directory that is the layer below a snapshot without a parent, if there is one."""
        return f"{self.snapshots}/{identifier}/{ABOUT}/live"

    def captured(self, identifier: int) -> str:
        """What the directory that a snapshot was captured from looked like."""
        return f"{self.snapshots}/{identifier}/{ABOUT}/captured"

    @property
    def blobs(self) -> str:
        """Where the blobs of images are, each by its digest in hexadecimal."""
        return f"{self.content}/blobs/sha256"

    @property
    def images(self) -> str:
        """The copy of the names of the images."""
        return f"{self.content}/images.json"

    @property
    def partial(self) -> str:
        """What is being restored from a backup."""
        return f"{self.root}/restore.partial"

    def prepare(self, *, create: bool) -> None:
        """Check the root, and create what is missing in it.

        Args:
            create: create the root itself if it does not exist.

        Raises:
            NotFound: there is no root and ``create`` is false.
            FailedPrecondition: it is a symlink, belongs to another user, is writable by others, or holds other files.
            OnlapError: of another kind, for errors of the filesystem.
        """
        with errors.translated("prepare the root", key=self.root):
            self._make_root(create)
            self._check_root()
            for directory in (self.staging, self.snapshots, self.trash):
                _make_directory(directory, 0o700)
            _make_directory(self.empty, 0o755)
            self.make_reserve()

    def _make_root(self, create: bool) -> None:
        if exists(self.root):
            if not create and not exists(self.database):
                self.check_new()
                raise self._missing()
            return
        if not create:
            raise self._missing()
        os.makedirs(os.path.dirname(self.root), exist_ok=True)
        _make_directory(self.root, 0o700)

    def _missing(self) -> errors.NotFound:
        return errors.NotFound(
            f"there is no root at {shown(self.root)}", key=self.root, hint="create one with: onlap init"
        )

    def check_trusted(self) -> None:
        """Check that there is a root, and that only its owner may write to it; raises as :meth:`prepare`."""
        if not exists(self.root):
            raise self._missing()
        status = os.lstat(self.root)
        if stat.S_ISLNK(status.st_mode):
            raise self._refused("is a symlink", "give the directory that it points to")
        if not stat.S_ISDIR(status.st_mode):
            raise self._refused("is not a directory", "give another place")
        if status.st_uid != os.geteuid():
            raise self._refused(f"belongs to user {status.st_uid}", "run as that user, or give another place")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise self._refused("can be written by others", f"chmod 700 {shown(self.root)}")

    def _check_root(self) -> None:
        self.check_trusted()
        if not exists(self.database):
            self.check_new()
            from onlap.probing.probe import SCRATCH

            self.remove_leftovers()
            # Another process may be probing here, to create the root as well.
            strangers = sorted(name for name in os.listdir(self.root) if not _is_ours(name) and SCRATCH not in name)
            if strangers:
                raise self._refused(f"holds other files ({shown(strangers[0])})", "give an empty or new directory")
        if not _has_content(self.database):
            self.check_new()

    def remove_leftovers(self) -> None:
        """Remove the scratch directories of probes and restores that were killed; raises OSError."""
        from onlap.probing.probe import remove_abandoned

        remove_abandoned(self.root)
        if exists(self.database):
            with contextlib.suppress(OSError):  # there is none, or it is not empty: its catalog.db leaves it last
                os.rmdir(self.partial)

    def check_new(self) -> None:
        """Refuse to create a catalog where there are trees: cleanup would delete them, since none would have a record.

        Raises:
            FailedPrecondition: they are being restored.
            DataLoss: there are trees.
        """
        if exists(self.partial):
            raise errors.FailedPrecondition(
                f"a backup is being restored to {shown(self.root)}, or that was interrupted",
                key=self.root,
                hint="wait for it, or restore it again; to start over, remove the directory",
            )
        if is_directory(self.snapshots) and os.listdir(self.snapshots):
            raise errors.DataLoss(
                f"the root {shown(self.root)} has trees and no catalog of them",
                key=self.root,
                hint="rebuild it from the records beside the trees: onlap check --repair",
            )

    def _refused(self, why: str, hint: str) -> errors.FailedPrecondition:
        return errors.FailedPrecondition(f"the root {shown(self.root)} {why}", key=self.root, hint=hint)

    def make_reserve(self) -> None:
        """Allocate what is missing of the reserve; a disk that is too full for it, or read-only, is not an error."""
        try:
            for name in self._reserved_inodes:
                if not exists(name):
                    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            if not _is_allocated(self.reserve):
                self._allocate_reserve()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP, errno.EROFS):
                raise

    def _allocate_reserve(self) -> None:
        fd = os.open(self.reserve, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if filesystem_magic(fd) == BTRFS:
                for number in range(RESERVE_METADATA // _ATTRIBUTE_SIZE):
                    os.setxattr(fd, f"user.{number}", bytes(_ATTRIBUTE_SIZE))
            os.posix_fallocate(fd, 0, RESERVE_SIZE)
        except OSError:
            os.unlink(self.reserve)
            raise
        finally:
            os.close(fd)

    def drop_reserve(self) -> bool:
        """Free the reserve's space and inodes; whether there were any."""
        dropped = False
        for path in (self.reserve, *self._reserved_inodes):
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            dropped = True
        return dropped

    @property
    def _reserved_inodes(self) -> list[str]:
        return [f"{self.reserve}.{number}" for number in range(1, RESERVE_INODES + 1)]


def _is_allocated(path: str) -> bool:
    try:
        return os.lstat(path).st_blocks * 512 >= RESERVE_SIZE
    except FileNotFoundError:
        return False


def _has_content(path: str) -> bool:
    """Whether it can be a database at all: checked before SQLite opens it, which deletes the log of an empty one."""
    try:
        return os.stat(path).st_size >= _SMALLEST_DATABASE
    except FileNotFoundError:
        return False


# The smallest page of SQLite (sqlite.org/fileformat2.html, "The Database Header").
_SMALLEST_DATABASE = 512

OURS = {
    "catalog.db", "catalog.db-journal", "catalog.db-wal", "catalog.db-shm", "catalog.db-try", "catalog.lock", "staging",
    "snapshots", "trash", "empty", "reserve", "runs", "content", "lost+found", UNRECORDED,
    *(f"reserve.{number}" for number in range(1, RESERVE_INODES + 1)),
}  # fmt: skip


def _is_ours(name: str) -> bool:
    return name in OURS or name.startswith("catalog.db.damaged-")


def _make_directory(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    drop_acls(path)
    os.chmod(path, mode)  # whatever the umask or an inherited ACL took away
