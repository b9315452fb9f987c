"""Where and how trials run: their answers, their directories, and overlays for the time of a block."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from onlap.errors import shown
from onlap.overlayfs import markers, options
from onlap.syscalls import files
from onlap.syscalls import mount as api

# How the kernel takes the layers of an overlay.
BY_FD = "fd"  # Linux 6.13: lowerdir+ as a descriptor
BY_PROC = "proc"  # Linux 6.8: lowerdir+ as a string of at most 255 bytes, so /proc/self/fd/N
BY_STRING = "string"  # mount(2), attached

NEEDS_PRIVILEGE = "needs CAP_SYS_ADMIN"

OVERLAYFS_MAGIC = 0x794C7630  # include/uapi/linux/magic.h

TRUSTED = markers.Markers(markers.TRUSTED)


class Feature(NamedTuple):
    """One answer: whether it works, and in one line why not; where it works, empty or a short note."""

    ok: bool
    reason: str


class No(Exception):
    """A trial's answer is no; its text is the reason."""


class Bench(NamedTuple):
    """Where and how trials run.

    Attributes:
        base: an empty directory for them; the working directory (``"."``) where :data:`BY_STRING` is used.
        way: one of :data:`BY_FD`, :data:`BY_PROC`, :data:`BY_STRING`.
        quick: ``("volatile",)`` where the kernel has that: the unmount of another writable overlay writes out
            all of the upper's filesystem, which may be much.
    """

    base: str
    way: str
    quick: tuple[str, ...]


def attempt(trial: Callable[..., str], *arguments: object) -> Feature:
    """Run a trial, which gives a note or "" when it went well; what the kernel refuses becomes the reason."""
    try:
        return Feature(True, trial(*arguments))
    except No as no:
        return Feature(False, str(no))
    except OSError as error:
        return Feature(False, said(error))


def said(error: OSError) -> str:
    """The kernel's words, in one line."""
    return shown(error.strerror or error)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Turn an OSError of a block into a no that says what failed."""
    try:
        yield
    except OSError as error:
        raise No(f"cannot {what}: {said(error)}") from error


def expect(truth: bool, otherwise: str) -> None:
    if not truth:
        raise No(otherwise)


# Layers and mounts


class Case:
    """Fresh directories for one overlay: ``top`` and ``bottom`` (lower), ``upper``, ``work``, ``more``."""

    __slots__ = ("directory",)

    def __init__(self, bench: Bench, name: str, *more: str) -> None:
        self.directory = os.path.join(bench.base, name)
        os.mkdir(self.directory)
        if bench.way == BY_STRING:
            more += ("merged",)
        for part in ("top", "bottom", "upper", "work", *more):
            os.mkdir(self.path(part))

    def path(self, *parts: str) -> str:
        return os.path.join(self.directory, *parts)

    @property
    def lowers(self) -> tuple[str, str]:
        return self.path("top"), self.path("bottom")


def detect(base: str) -> Bench:
    """How this kernel takes an overlay's layers, by offering it one; nothing is mounted.

    Raises:
        No: there is no OverlayFS, or no privilege to mount it.
    """
    try:
        fs = api.fsopen("overlay")
    except OSError as error:
        if error.errno == errno.ENOSYS:  # before Linux 5.2, or a seccomp filter
            return Bench(base, BY_STRING, ())
        if error.errno == errno.EPERM:
            raise No(NEEDS_PRIVILEGE) from error
        if error.errno == errno.ENODEV:
            raise No("this kernel has no OverlayFS (modprobe overlay)") from error
        raise No(f"cannot open a mount context: {said(error)}") from error
    try:
        quick = ("volatile",) if _takes(lambda: api.fsconfig_flag(fs, "volatile")) else ()
        directory = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _takes(lambda: api.fsconfig_fd(fs, "lowerdir+", directory)):
                return Bench(base, BY_FD, quick)
            if _takes(lambda: api.fsconfig_string(fs, "lowerdir+", f"/proc/self/fd/{directory}")):
                return Bench(base, BY_PROC, quick)
        finally:
            os.close(directory)
    finally:
        os.close(fs)
    return Bench(base, BY_STRING, ())


def _takes(setting: Callable[[], None]) -> bool:
    try:
        setting()
    except OSError:
        # EINVAL: unknown here. What else there may be shows again, with its reason, in a real mount.
        return False
    return True


@contextlib.contextmanager
def mounted_overlay(
    bench: Bench,
    case: Case,
    *extra: str,
    lowers: tuple[str, ...] | None = None,
    data: tuple[str, ...] = (),
    writable: bool = True,
    attach_at: str | None = None,
) -> Iterator[str]:
    """An overlay of a case's layers for the time of a block.

    Args:
        bench: how to mount it.
        case: its directories.
        extra: mount options.
        lowers: instead of the case's own.
        data: data-only layers.
        writable: with an upper layer.
        attach_at: a directory, in a mount namespace of our own; where possible it is detached without this.

    Yields:
        Where its root is.

    Raises:
        No: the kernel does not mount it.
    """
    lowers = case.lowers if lowers is None else lowers
    flags = list(extra)
    if writable and "volatile" not in flags:
        flags += bench.quick
    layers = [("lowerdir+", path) for path in lowers] + [("datadir+", path) for path in data]
    layers += [("upperdir", case.path("upper")), ("workdir", case.path("work"))] if writable else []
    if bench.way != BY_STRING:
        with doing("mount the overlay"):
            fd = detached(layers, flags, bench.way)
        try:
            if attach_at is not None:
                with attached(fd, attach_at) as where:
                    yield where
            else:
                yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)
        return
    with mounted("overlay", attach_at or case.path("merged"), _string(layers, flags)) as where:
        yield where


def _string(layers: list[tuple[str, str]], flags: list[str]) -> bytes:
    lowerdir = options.join_lowers(os.fsencode(path) for key, path in layers if key == "lowerdir+")
    for key, path in layers:
        if key == "datadir+":
            lowerdir += b"::" + options.escape(os.fsencode(path))
    rest = [f"{key}={path}" for key, path in layers if not key.endswith("+")]
    return b",".join([b"lowerdir=" + lowerdir, *map(os.fsencode, rest + flags)])


@contextlib.contextmanager
def attached(fd: int, where: str) -> Iterator[str]:
    """A detached mount attached at ``where`` for the time of a block, in a mount namespace of our own."""
    with doing("attach it"):
        api.move_mount(fd, where)
    try:
        yield where
    finally:
        _unmount(where)


@contextlib.contextmanager
def mounted(fstype: str, where: str, data: bytes | None = None) -> Iterator[str]:
    """A mount by mount(2) for the time of a block, in a mount namespace of our own."""
    with doing(f"mount the {fstype}"):
        api.mount(fstype, where, fstype, 0, data)
    try:
        yield where
    finally:
        _unmount(where)


def _unmount(where: str) -> None:
    # Lazily: an overlay that was just closed lets go of its layers a little later, and until then they are
    # EBUSY. This is a mount namespace of our own: what is left in it ends with the process.
    api.umount2(where, api.MNT_DETACH)


def detached(layers: list[tuple[str, str]], flags: list[str], way: str) -> int:
    """A detached overlay of ``(key, directory)`` layers; the OSError holds what the kernel's log says."""
    fs = api.fsopen("overlay")
    try:
        for key, path in layers:
            _add(fs, key, path, way)
        for flag in flags:
            name, equals, value = flag.partition("=")
            if equals:
                api.fsconfig_string(fs, name, value)
            else:
                api.fsconfig_flag(fs, name)
        api.fsconfig_create(fs)
        return api.fsmount(fs)
    except OSError as error:
        log = api.fs_context_log(fs)
        raise OSError(error.errno, f"{error.strerror} ({log})" if log else error.strerror) from error
    finally:
        os.close(fs)


def _add(fs: int, key: str, path: str, way: str) -> None:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if way == BY_FD:
            api.fsconfig_fd(fs, key, fd)
        else:
            api.fsconfig_string(fs, key, f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def is_overlay(directory: str) -> bool:
    """Whether a directory is itself on OverlayFS."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return files.filesystem_magic(fd) == OVERLAYFS_MAGIC
    finally:
        os.close(fd)


def with_upper_in_mind(directory: str, overlay: Feature) -> Feature:
    """The answer for an overlay whose upper layer is in ``directory``, with the plain reason if that is one.

    The kernel says so in the mount context's log, or in dmesg only; the call answers EINVAL.
    """
    if overlay.ok or overlay.reason == NEEDS_PRIVILEGE or not is_overlay(directory):
        return overlay
    return Feature(False, "this directory is itself on OverlayFS, which is not supported as upperdir")


# What is done in an overlay


def populate(directory: str) -> None:
    """Fill the lower layers of an overlay that :func:`use` will work in; ``top`` and ``bottom`` are there."""
    bottom, top = os.path.join(directory, "bottom"), os.path.join(directory, "top")
    for name in ("kept", "deleted", "moved"):
        write(os.path.join(bottom, name), "bottom")
    os.mkdir(os.path.join(bottom, "dir"))
    write(os.path.join(bottom, "dir", "inside"), "bottom")
    write(os.path.join(top, "kept"), "top")


def use(merged: str, directory: str) -> None:
    """Read, create, change, delete, rename, and make a directory where one was deleted, as programs do.

    Raises:
        No: one of these does not work, or does the wrong thing.
    """
    upper = os.path.join(directory, "upper")
    with doing("read a file in it"):
        expect(read(os.path.join(merged, "kept")) == "top", "the upper of two lower layers does not win")
    with doing("create a file in it"):
        write(os.path.join(merged, "new"), "new")
        expect(os.path.exists(os.path.join(upper, "new")), "a new file is not in the upper layer")
    with doing("change a file of a lower layer"):
        write(os.path.join(merged, "kept"), "changed")
        expect(read(os.path.join(directory, "top", "kept")) == "top", "a change went into a lower layer")
    with doing("delete a file of a lower layer"):
        os.unlink(os.path.join(merged, "deleted"))
        whiteout = markers.is_whiteout(os.lstat(os.path.join(upper, "deleted")))
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
