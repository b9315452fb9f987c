"""Mounts that last as long as a ``with`` block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from onlap import errors
from onlap.arguments import check_path
from onlap.errors import shown
from onlap.forks import closed_in_children, unless_forked
from onlap.mounts import kernel, mountinfo
from onlap.mounts.holders import holders, holders_of_mount
from onlap.mounts.plan import Mount
from onlap.mounts.unmount import await_nobody, busy, unmount
from onlap.mounts.userns import may_mount
from onlap.syscalls.files import mount_id

if TYPE_CHECKING:
    from pathlib import Path

    from onlap.mounts.helper.lazy import Helper


@contextlib.contextmanager
def mounted(
    plan: list[Mount],
    at: str | os.PathLike[str] | None = None,
    *,
    detached: bool = False,
    timeout: float = 5.0,
    helper: Helper | None = None,
) -> Iterator[Path]:
    """See :func:`onlap.mounted`; without ``at``, in a temporary directory.

    Args:
        plan: likewise.
        at: likewise.
        detached: likewise.
        timeout: likewise.
        helper: of the store that it belongs to; by default one is started for this mount.
    """
    from onlap.mounts.paths import tree_path

    with ExitStack() as stack:
        if at is None and len(plan) == 1 and plan[0].needs_no_mount and (detached or not may_mount()):
            where = os.path.abspath(plan[0].source)
        elif detached or (at is None and not may_mount()):
            where = _detached(plan, helper, timeout, stack)
        else:
            where = _attached(plan, at, timeout, stack)
        yield tree_path(where)


def await_leaving(directory: Path) -> None:
    """Wait until a directory is no longer used that :func:`mounted` yielded without a mount.

    Raises:
        Busy: it is still in use.
    """
    where = os.fspath(directory)
    await_nobody(where, lambda: holders(where))


def check_plan(mounts: object) -> list[Mount]:
    """The mounts of a plan; InvalidArgument if it is not one."""
    if isinstance(mounts, Mount):
        return [mounts]
    if isinstance(mounts, (str, bytes, os.PathLike)):
        raise errors.InvalidArgument(
            f"{shown(repr(mounts))} is not a plan to mount",
            hint="give the result of mounts(key) or prepare(key); or use a store: store.mounted(key)",
        )
    plan: list[Mount] = []
    for mount in mounts if isinstance(mounts, Iterable) else [mounts]:
        if not isinstance(mount, Mount):
            raise errors.InvalidArgument(
                f"{shown(repr(mount))} is not an onlap.Mount", hint="give the result of mounts(key) or prepare(key)"
            )
        plan.append(mount)
    if not plan:
        raise errors.InvalidArgument("the plan is empty")
    return plan


def may_detach() -> bool:
    """Whether the mounts of a plan can be detached, by this process or by a helper."""
    return not may_mount() or kernel.layers_by() != kernel.LAYERS_BY_STRING


def _attached(plan: list[Mount], at: str | os.PathLike[str] | None, timeout: float, stack: ExitStack) -> str:
    if at is None:
        import tempfile

        where = tempfile.mkdtemp(prefix="onlap-")
        # rmdir, never a recursive delete: after a failed unmount, that would delete the tree through the mount.
        stack.callback(unless_forked(_remove_if_empty), where)
    else:
        where = os.path.abspath(check_path(at, "mount point"))
    for mount in plan:
        target = os.path.join(where, mount.target.lstrip("/")) if mount.target else where
        # A mount point that is a symlink may lead elsewhere by the end of the block.
        target = os.path.realpath(target)
        kernel.attach(mount, target)
        with ExitStack() as on_error:
            on_error.callback(unmount, target, timeout=timeout)
            stack.callback(_unmounting(target, timeout))
            on_error.pop_all()
        if "rbind" in mount.flags:
            # The mounts below its source came with it; they are unmounted first, the deepest before the others.
            for inner in mountinfo.below(os.fsencode(target)):
                stack.callback(_unmounting(os.fsdecode(inner), timeout))
    return where


def _unmounting(target: str, timeout: float) -> Callable[[], None]:
    """A function that unmounts what is mounted at ``target`` now, and nothing that is mounted there later."""
    number = _mounted_at(target)

    def end() -> None:
        now = target
        if number and _mounted_at(target) != number:
            # It was unmounted by its user, moved with a directory above it, or covered by another mount.
            found = [entry for entry in mountinfo.parse(mountinfo.own(), b"%d " % number) if entry.id == number]
            if not found:
                return
            now = os.fsdecode(found[0].mountpoint)
            if _mounted_at(now) not in (number, None):
                raise busy(now, [f"mount {shown(now)}, on top of it"], "unmount that first")
        unmount(now, timeout=timeout)

    return unless_forked(end)


def _mounted_at(path: str) -> int | None:
    """The id of the mount that a path leads to; None if that cannot be determined."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return mount_id(fd)
        finally:
            os.close(fd)
    except OSError:
        return None


def _remove_if_empty(directory: str) -> None:
    with contextlib.suppress(OSError):  # EBUSY, ENOTEMPTY: the unmount failed, and raised its own error
        os.rmdir(directory)


def _detached(plan: list[Mount], helper: Helper | None, timeout: float, stack: ExitStack) -> str:
    if len(plan) > 1:
        raise errors.Unimplemented(
            "a plan of several mounts cannot be detached",
            hint="give a mount point, with the privilege to mount there",
        )
    fd = detached(plan[0], helper)
    if not plan[0].readonly:
        # A descriptor of which nobody knows, since the kernel gives the number of a mount that is gone to the next one.
        kept = os.dup(fd)
        stack.callback(closed_in_children(kept))
        stack.callback(unless_forked(_await_nobody), plan[0], kept, timeout)
    # Child processes reach it through this process's /proc, as long as it is open here.
    stack.callback(closed_in_children(fd))
    return f"/proc/{os.getpid()}/fd/{fd}"


def detached(plan: Mount, helper: Helper | None) -> int:
    """A descriptor of a detached mount, with or without the privilege to mount; see :func:`mounted`.

    Raises:
        PermissionDenied: mounting is not allowed here, not even in a user namespace.
        OnlapError: of another kind, for an error of the kernel.
    """
    if may_mount():
        return kernel.detached(plan)
    if helper is not None:
        return helper.client.detached(plan)
    from onlap.mounts.helper.client import Client

    with Client() as client:
        return client.detached(plan)


def _await_nobody(mount: Mount, kept: int, timeout: float) -> None:
    # No unmount fails where a detached mount is in use, and its users would go on writing into a committed snapshot.
    number, device = mount_id(kept), os.fstat(kept).st_dev
    await_nobody(mount.upper or mount.source, lambda: holders_of_mount(number, device, kept), timeout=timeout)
