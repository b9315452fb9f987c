"""The result of a trial, the directories that it works in, and an overlay of them for the duration of a block."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from onlap.errors import OnlapError, shown
from onlap.mounts import kernel
from onlap.mounts.plan import Mount, overlay
from onlap.overlayfs import markers
from onlap.syscalls import files
from onlap.syscalls import mount as calls
from onlap.trees.walk import opened

NEEDS_PRIVILEGE = "needs CAP_SYS_ADMIN"

OVERLAYFS_MAGIC = 0x794C7630  # include/uapi/linux/magic.h

TRUSTED = markers.Markers(markers.TRUSTED)


class Feature(NamedTuple):
    """One answer: whether it works, and one line why not; if it works, the line is a short note or empty."""

    ok: bool
    reason: str


class Unsupported(Exception):
    """The trial failed; the text is the reason."""


class Scratch(NamedTuple):
    """Where and how trials run.

    Attributes:
        base: an empty directory for them.
        quick: ``("volatile",)`` where the kernel has that option: unmounting another writable overlay writes out the
            upper's whole filesystem, which may take long.
    """

    base: str
    quick: tuple[str, ...] = ()


def attempt(trial: Callable[..., str], *arguments: object) -> Feature:
    """Run a trial, which returns a note or ""; an error of the kernel becomes the reason."""
    try:
        return Feature(True, trial(*arguments))
    except Unsupported as error:
        return Feature(False, str(error))
    except OSError as error:
        return Feature(False, reason_of(error))


def reason_of(error: OSError) -> str:
    """The kernel's error message, in one line."""
    return shown(error.strerror or error)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Turn an error in a block into an Unsupported that says what failed."""
    try:
        yield
    except OnlapError as error:
        # Without the path, which is in the scratch directory.
        cause = error.__cause__
        raise Unsupported(f"cannot {what}: {reason_of(cause)}" if isinstance(cause, OSError) else str(error)) from error
    except OSError as error:
        raise Unsupported(f"cannot {what}: {reason_of(error)}") from error


def expect(truth: bool, otherwise: str) -> None:
    if not truth:
        raise Unsupported(otherwise)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


# Overlays


def detect(base: str) -> Scratch:
    """Find out, without a mount, how an overlay can be tried in a directory.

    Raises:
        Unsupported: there is no OverlayFS, or no privilege to mount it.
    """
    try:
        if kernel.layers_by() == kernel.LAYERS_BY_STRING:
            return Scratch(base)
        fs = calls.fsopen("overlay")
    except OSError as error:
        if error.errno == errno.EPERM:
            raise Unsupported(NEEDS_PRIVILEGE) from error
        if error.errno == errno.ENODEV:
            raise Unsupported("this kernel has no OverlayFS (modprobe overlay)") from error
        raise Unsupported(f"cannot open a mount context: {reason_of(error)}") from error
    try:
        calls.fsconfig_flag(fs, "volatile")
    except OSError:  # EINVAL before Linux 5.10
        return Scratch(base)
    finally:
        os.close(fs)
    return Scratch(base, ("volatile",))


class Case:
    """Fresh directories for one overlay: ``top`` and ``bottom`` (lower), ``upper``, ``work``, ``merged``, ``more``."""

    __slots__ = ("directory", "quick")

    def __init__(self, scratch: Scratch, name: str, *more: str) -> None:
        self.directory = os.path.join(scratch.base, name)
        self.quick = scratch.quick
        os.mkdir(self.directory)
        for part in ("top", "bottom", "upper", "work", "merged", *more):
            os.mkdir(self.path(part))

    def path(self, *parts: str) -> str:
        return os.path.join(self.directory, *parts)

    def plan(self, *flags: str, lowers: tuple[str, ...] | None = None, writable: bool = True) -> Mount:
        """An overlay of these directories, or of other lower ones."""
        lowers = lowers or (self.path("top"), self.path("bottom"))
        if not writable:
            return overlay(lowers, flags=flags)
        flags += self.quick if "volatile" not in flags else ()
        return overlay(lowers, upper=self.path("upper"), work=self.path("work"), flags=flags)


@contextlib.contextmanager
def mounted(plan: Mount, where: str) -> Iterator[str]:
    """A mount for the duration of a block; yields the path of its root.

    Args:
        plan: what to mount.
        where: the mount point on kernels without detached overlays, in our own mount namespace.

    Raises:
        Unsupported: the kernel does not mount it.
    """
    if kernel.layers_by() == kernel.LAYERS_BY_STRING:
        with attached(plan, where):
            yield where
        return
    with doing(f"mount the {plan.type}"):
        fd = kernel.detached(plan)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def attached(plan: Mount, where: str) -> Iterator[None]:
    """As :func:`mounted`, always attached at ``where``, in our own mount namespace."""
    with doing(f"mount the {plan.type}"):
        kernel.attach(plan, where)
    try:
        yield
    finally:
        # Lazily: an overlay that was just closed releases its layers a little later, and until then they are EBUSY.
        # This is our own mount namespace: what is left in it ends with the process.
        calls.umount2(where, calls.MNT_DETACH)


def is_overlay(directory: str) -> bool:
    """Whether a directory is itself on OverlayFS."""
    with opened(directory) as fd:
        return files.filesystem_magic(fd) == OVERLAYFS_MAGIC


def explain_nesting(directory: str, found: Feature) -> Feature:
    """The answer for an overlay with its upper layer in ``directory``; if that is itself on an overlay, say so.

    The kernel gives this reason in the mount context's log, or only in dmesg; the call fails with EINVAL.
    """
    if found.ok or found.reason == NEEDS_PRIVILEGE or not is_overlay(directory):
        return found
    return Feature(False, "this directory is itself on OverlayFS, which is not supported as upperdir")


# Working in an overlay


def populate(case: Case) -> None:
    """Fill the lower layers of an overlay for :func:`use`."""
    for name in ("kept", "deleted", "moved"):
        write(case.path("bottom", name), "bottom")
    os.mkdir(case.path("bottom", "dir"))
    write(case.path("bottom", "dir", "inside"), "bottom")
    write(case.path("top", "kept"), "top")


def use(merged: str, case: Case) -> None:
    """Read, create, change, delete, rename, and recreate a deleted directory, as programs do.

    Raises:
        Unsupported: one of these fails, or has the wrong result.
    """
    with doing("read a file in it"):
        expect(read(os.path.join(merged, "kept")) == "top", "the upper of two lower layers does not win")
    with doing("create a file in it"):
        write(os.path.join(merged, "new"), "new")
        expect(os.path.exists(case.path("upper", "new")), "a new file is not in the upper layer")
    with doing("change a file of a lower layer"):
        write(os.path.join(merged, "kept"), "changed")
        expect(read(case.path("top", "kept")) == "top", "a change went into a lower layer")
    with doing("delete a file of a lower layer"):
        os.unlink(os.path.join(merged, "deleted"))
        whiteout = markers.is_whiteout(os.lstat(case.path("upper", "deleted")))
        expect(whiteout and "deleted" not in os.listdir(merged), "a deleted file left no whiteout")
    with doing("rename a file of a lower layer"):
        os.rename(os.path.join(merged, "moved"), os.path.join(merged, "renamed"))
        expect(read(os.path.join(merged, "renamed")) == "bottom", "a renamed file lost its content")
    with doing("delete a directory of a lower layer"):
        os.unlink(os.path.join(merged, "dir", "inside"))
        os.rmdir(os.path.join(merged, "dir"))
    with doing("make a directory where one was deleted"):
        os.mkdir(os.path.join(merged, "dir"))
        expect(not os.listdir(os.path.join(merged, "dir")), "a deleted directory came back with its content")
