"""The directory of a run with a container, and cleaning up behind a run.

::

    ROOT/runs/<id>/        see onlap.catalog.runs
      runtime              the path of the runtime's program; empty until there is one
      mount-points         see onlap.containers.mount_points
      config.json          the container's configuration, for the runtime
      rootfs/              where the snapshot is mounted
      state/, log, pid     the runtime's
      hosts, hostname, resolv.conf   files that the container sees

When this process is killed, :mod:`onlap.catalog.runs` cleans up behind it, and ends the container by :func:`end`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from onlap import errors
from onlap.catalog import runs
from onlap.catalog.catalog import Catalog
from onlap.catalog.runs import Run
from onlap.containers import mount_points, orphans, runtime
from onlap.forks import unless_forked
from onlap.mounts import mountinfo
from onlap.snapshots.recorded import RecordedSnapshotter


def container_id(directory: str) -> str:
    """The runtime's name for the container of a run, also the name of its cgroup; it shows that it is Onlap's."""
    return f"onlap-{os.path.basename(directory)}"


def rootfs(directory: str) -> str:
    """Where the snapshot of a run is mounted."""
    return f"{directory}/rootfs"


@contextlib.contextmanager
def claimed(snapshotter: RecordedSnapshotter) -> Iterator[Run]:
    """A new run for a container, cleaned up at the end; dead runs are cleaned up before.

    Raises:
        OnlapError: the filesystem refuses, or the container does not end.
    """
    catalog = snapshotter.catalog
    runs.sweep(catalog, end)
    with Run(catalog.layout.root) as run:
        # The file comes before mount points in a tree: a sweep that cannot end containers leaves such a run alone.
        with (
            errors.translated("make the directory of a run", key=run.directory),
            open(f"{run.directory}/{runs.CONTAINER}", "x"),
        ):
            os.mkdir(rootfs(run.directory), 0o700)
        with contextlib.ExitStack() as stack:
            stack.callback(unless_forked(_finish), catalog, run)
            yield run


def _finish(catalog: Catalog, run: Run) -> None:
    try:
        _end(run.directory)
        runs.forget(catalog, run.id)
    except BaseException:
        run.leave()
        raise


def end(directory: str) -> None:
    """End what there is of a dead run's container, and remove its mount points; the caller holds the directory.

    Raises:
        OnlapError: the container does not end, or the filesystem refuses.
    """
    if not os.path.lexists(f"{directory}/{runs.CONTAINER}"):
        return  # it has no container, or none yet
    # First of all: a runtime that is still alive would continue to make the container.
    with errors.translated("end what is left of a container", key=directory):
        orphans.end(container_id(directory))
    _end(directory)


def _end(directory: str) -> None:
    try:
        with open(f"{directory}/{runs.CONTAINER}", encoding="utf-8", errors="surrogateescape") as file:
            program = file.read()
        if program:  # else there is no container yet
            runtime.delete(program, directory, container_id(directory))
        if os.fsencode(rootfs(directory)) in mountinfo.below(os.fsencode(directory)):
            mount_points.remove(directory, rootfs(directory))
    except FileNotFoundError:
        pass  # it has not come so far
    except OSError as error:
        raise errors.from_oserror(error, doing="clean up behind a run", key=directory) from error
