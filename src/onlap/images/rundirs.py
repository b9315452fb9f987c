"""The directory of a run, and what is left of runs whose Onlap was killed.

::

    ROOT/runs/<id>/        0700; held by the flock of the process that runs it
      runtime              the path of the runtime's program
      mount-points         paths that the tree of a snapshot that stays did not have: JSON
      config.json          the container, as the runtime takes it
      rootfs/              where the snapshot is mounted
      state/, log, pid     the runtime's
      hosts, resolv.conf   files that the container sees

A snapshot that is to go with the run has the label :data:`LABEL`. A directory without a living holder is that of a dead
run: its container is killed, its mount taken away, its snapshot removed, and the directory last, so that a crash on the
way leaves something that the next one finds.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence

from onlap import errors
from onlap.catalog.locks import Held, claim_directory, lock_directory, open_directory
from onlap.images import rooted, runtime
from onlap.mounts.unmount import unmount
from onlap.snapshots.recorded import RecordedSnapshotter
from onlap.trees.remove import remove as remove_tree

LABEL = "onlap.io/run"


def container_id(directory: str) -> str:
    """What the runtime calls the container of a run: also the name of its cgroup, so it says whose it is."""
    return f"onlap-{os.path.basename(directory)}"


def rootfs(directory: str) -> str:
    """Where the snapshot of a run is mounted."""
    return f"{directory}/rootfs"


def _runs(snapshotter: RecordedSnapshotter) -> str:
    return os.path.join(snapshotter.root, "runs")


@contextlib.contextmanager
def without_mount_points(directory: str, targets: Sequence[str]) -> Iterator[None]:
    """Take away, at the end, the empty files and directories that the runtime makes in the tree to mount at.

    They would be changes of a snapshot that stays, and in the layer that is made of it.

    Args:
        directory: of the run, whose snapshot is mounted.
        targets: where something will be mounted.

    Raises:
        OSError: the tree, or the directory, refuses.
    """
    root = os.open(rootfs(directory), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        missing = {part for target in targets for part in rooted.missing_parts(root, target)}
    finally:
        os.close(root)
    with open(f"{directory}/mount-points", "w", encoding="utf-8") as file:
        json.dump(sorted(missing, key=len, reverse=True), file)
    try:
        yield
    finally:
        _remove_mount_points(directory)


def _remove_mount_points(directory: str) -> None:
    try:
        with open(f"{directory}/mount-points", encoding="utf-8") as file:
            paths = json.load(file)
    except (FileNotFoundError, ValueError):  # ValueError: a crash while it was written, before there was a container
        return
    root = os.open(rootfs(directory), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in paths:
            rooted.remove_if_empty(root, path)
    finally:
        os.close(root)


@contextlib.contextmanager
def claimed(snapshotter: RecordedSnapshotter) -> Iterator[str]:
    """A new directory for a run; removed at the end, with what is left in it.

    Raises:
        OnlapError: the filesystem refuses, or the container does not end.
    """
    runs = _runs(snapshotter)
    try:
        os.makedirs(runs, 0o700, exist_ok=True)
        directory, held = _claim(runs)
    except OSError as error:
        raise errors.from_oserror(error, doing="make the directory of a run", key=runs) from error
    try:
        yield directory
    finally:
        try:
            _clear(snapshotter, directory)
        finally:
            held.release()


def _claim(runs: str) -> tuple[str, Held]:
    while True:
        directory = f"{runs}/{os.urandom(6).hex()}"
        held = claim_directory(directory)
        if held is not None:
            os.mkdir(rootfs(directory), 0o700)
            return directory, held


def sweep(snapshotter: RecordedSnapshotter) -> int:
    """Clean up behind runs whose process is dead; returns how many there were.

    Raises:
        OnlapError: something of them cannot be removed; the rest was.
    """
    runs = _runs(snapshotter)
    try:
        names = sorted(os.listdir(runs))
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise errors.from_oserror(error, doing="look for dead runs", key=runs) from error
    dead = 0
    failed: errors.OnlapError | None = None
    for name in names:
        try:
            dead += _sweep_one(snapshotter, f"{runs}/{name}")
        except errors.OnlapError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return dead


def _sweep_one(snapshotter: RecordedSnapshotter, directory: str) -> bool:
    try:
        held = lock_directory(directory)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise errors.from_oserror(error, doing="look at a run", key=directory) from error
    if held is None:
        return False
    with held:
        _clear(snapshotter, directory)
    return True


def _clear(snapshotter: RecordedSnapshotter, directory: str) -> None:
    """Take away what there is of a run; the caller holds its directory."""
    try:
        with open(f"{directory}/runtime", encoding="utf-8", errors="surrogateescape") as file:
            program = file.read()
    except FileNotFoundError:
        pass  # it had not come so far
    except OSError as error:
        raise errors.from_oserror(error, doing="clean up behind a run", key=directory) from error
    else:
        if program:  # a power cut may have left the file empty, and no container
            runtime.delete(program, directory, container_id(directory))
    if os.path.ismount(rootfs(directory)):
        try:
            _remove_mount_points(directory)
        except OSError as error:
            raise errors.from_oserror(error, doing="clean up behind a run", key=directory) from error
        unmount(rootfs(directory))
    for info in list(snapshotter.walk(f'labels."{LABEL}"=={os.path.basename(directory)}')):
        snapshotter.remove(info.name, force=True)
    _remove(directory)


def _remove(directory: str) -> None:
    above, name = os.path.split(directory)
    try:
        fd = open_directory(above)
        try:
            # By descriptors, and never into a mount: nothing of the snapshot is deleted if that is still mounted.
            remove_tree(fd, name)
        finally:
            os.close(fd)
    except OSError as error:
        raise errors.from_oserror(error, doing="remove the directory of a run", key=directory) from error
