"""What a trial answers, the directories that it is given, and an overlay of them for the time of a block."""

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
from onlap.syscalls import mount as api
from onlap.trees.walk import opened

NEEDS_PRIVILEGE = "needs CAP_SYS_ADMIN"

OVERLAYFS_MAGIC = 0x794C7630  # include/uapi/linux/magic.h

TRUSTED = markers.Markers(markers.TRUSTED)


class Feature(NamedTuple):
    """One answer: whether it works, and in one line why not; where it works, empty or a short note."""

    ok: bool
    reason: str


class Unsupported(Exception):
    """A trial's answer is no; its text is the reason."""


class Scratch(NamedTuple):
    """Where and how trials run.

    Attributes:
        base: an empty directory for them.
        quick: ``("volatile",)`` where the kernel has that: the unmount of another writable overlay writes out
            all of the upper's filesystem, which may be much.
    """

    base: str
    quick: tuple[str, ...] = ()


def attempt(trial: Callable[..., str], *arguments: object) -> Feature:
    """Run a trial, which gives a note or "" when it went well; what the kernel refuses becomes the reason."""
    try:
        return Feature(True, trial(*arguments))
    except Unsupported as error:
        return Feature(False, str(error))
    except OSError as error:
        return Feature(False, said(error))


def said(error: OSError) -> str:
    """The kernel's words, in one line."""
    return shown(error.strerror or error)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Turn what fails in a block into a no that says what it was."""
    try:
        yield
    except OnlapError as error:
        # Without the path, which is that of a scratch directory.
        cause = error.__cause__
        raise Unsupported(f"cannot {what}: {said(cause)}" if isinstance(cause, OSError) else str(error)) from error
    except OSError as error:
        raise Unsupported(f"cannot {what}: {said(error)}") from error


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
    """How an overlay can be tried in a directory; nothing is mounted.

    Raises:
        Unsupported: there is no OverlayFS, or no privilege to mount it.
    """
    try:
        if kernel.layers_by() == kernel.LAYERS_BY_STRING:
            return Scratch(base)
        fs = api.fsopen("overlay")
    except OSError as error:
        if error.errno == errno.EPERM:
            raise Unsupported(NEEDS_PRIVILEGE) from error
        if error.errno == errno.ENODEV:
            raise Unsupported("this kernel has no OverlayFS (modprobe overlay)") from error
        raise Unsupported(f"cannot open a mount context: {said(error)}") from error
    try:
        api.fsconfig_flag(fs, "volatile")
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
    """A mount for the time of a block; yields where its root is.

    Args:
        plan: what to mount.
        where: used where this kernel has no detached overlays, in a mount namespace of our own.

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
    """The same, mounted at ``where``, in a mount namespace of our own."""
    with doing(f"mount the {plan.type}"):
        kernel.attach(plan, where)
    try:
        yield
    finally:
        # Lazily: an overlay that was just closed lets go of its layers a little later, and until then they are
        # EBUSY. This is a mount namespace of our own: what is left in it ends with the process.
        api.umount2(where, api.MNT_DETACH)


def is_overlay(directory: str) -> bool:
    """Whether a directory is itself on OverlayFS."""
    with opened(directory) as fd:
        return files.filesystem_magic(fd) == OVERLAYFS_MAGIC


def with_nesting_in_mind(directory: str, found: Feature) -> Feature:
    """The answer for an overlay whose upper layer is in ``directory``, with the plain reason if that is one.

    The kernel says so in the mount context's log, or in dmesg only; the call answers EINVAL.
    """
    if found.ok or found.reason == NEEDS_PRIVILEGE or not is_overlay(directory):
        return found
    return Feature(False, "this directory is itself on OverlayFS, which is not supported as upperdir")


# What is done in an overlay


def populate(case: Case) -> None:
    """Fill the lower layers of an overlay that :func:`use` will work in."""
    for name in ("kept", "deleted", "moved"):
        write(case.path("bottom", name), "bottom")
    os.mkdir(case.path("bottom", "dir"))
    write(case.path("bottom", "dir", "inside"), "bottom")
    write(case.path("top", "kept"), "top")


def use(merged: str, case: Case) -> None:
    """Read, create, change, delete, rename, and make a directory where one was deleted, as programs do.

    Raises:
        Unsupported: one of these does not work, or does the wrong thing.
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
