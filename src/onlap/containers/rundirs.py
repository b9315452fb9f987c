"""The directory of a run with a container, and what is left of it when its Onlap was killed.

::

    ROOT/runs/<id>/        see onlap.catalog.runs
      runtime              the path of the runtime's program; empty as long as there is none
      mount-points         see onlap.containers.mount_points
      config.json          the container, as the runtime takes it
      rootfs/              where the snapshot is mounted
      state/, log, pid     the runtime's
      hosts, hostname, resolv.conf   files that the container sees

What is left of it when this process is killed, :mod:`onlap.catalog.runs` takes away, which asks here for what it does
not know: to end the container.
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
    """What the runtime calls the container of a run: also the name of its cgroup, so it says whose it is."""
    return f"onlap-{os.path.basename(directory)}"


def rootfs(directory: str) -> str:
    """Where the snapshot of a run is mounted."""
    return f"{directory}/rootfs"


@contextlib.contextmanager
def claimed(snapshotter: RecordedSnapshotter) -> Iterator[Run]:
    """A new run for a container, behind which is cleaned up at the end; dead ones before it.

    Raises:
        OnlapError: the filesystem refuses, or the container does not end.
    """
    catalog = snapshotter.catalog
    runs.sweep(catalog, end)
    with Run(catalog.layout.root) as run:
        # The file before mount points are made in a tree: who sweeps and knows nothing of containers leaves them alone.
        with (
            errors.translated("make the directory of a run", key=run.directory),
            open(f"{run.directory}/{runs.CONTAINER}", "x"),
        ):
            os.mkdir(rootfs(run.directory), 0o700)
        with contextlib.ExitStack() as stack:
            stack.callback(unless_forked(_over), catalog, run)
            yield run


def _over(catalog: Catalog, run: Run) -> None:
    try:
        _end(run.directory)
        runs.forget(catalog, run.id)
    except BaseException:
        run.leave()
        raise


def end(directory: str) -> None:
    """End what there is of a dead run's container, and take its mount points away; the caller holds the directory.

    Raises:
        OnlapError: the container does not end, or the filesystem refuses.
    """
    if not os.path.lexists(f"{directory}/{runs.CONTAINER}"):
        return  # it was to have none, or had not come so far
    # Before anything of it is looked at: a runtime that lives on would go on making it.
    with errors.translated("end what is left of a container", key=directory):
        orphans.end(container_id(directory))
    _end(directory)


def _end(directory: str) -> None:
    try:
        with open(f"{directory}/{runs.CONTAINER}", encoding="utf-8", errors="surrogateescape") as file:
            program = file.read()
        if program:  # else there was no container yet
            runtime.delete(program, directory, container_id(directory))
        if os.fsencode(rootfs(directory)) in mountinfo.below(os.fsencode(directory)):
            mount_points.remove(directory, rootfs(directory))
    except FileNotFoundError:
        pass  # it had not come so far
    except OSError as error:
        raise errors.from_oserror(error, doing="clean up behind a run", key=directory) from error
