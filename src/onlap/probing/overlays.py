"""Trials of OverlayFS, with mounts. Each takes a scratch directory and returns a note, or raises :class:`Unsupported`.

A trial of a mount option checks the option's *effect*, since the kernel turns some options off by itself:
``index``, ``xino`` and ``metacopy`` where the upper filesystem has no file handles or xattrs.

Source: the kernel's Documentation/filesystems/overlayfs.rst; fs/overlayfs/params.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from onlap.errors import OnlapError
from onlap.mounts import kernel
from onlap.mounts.plan import Mount
from onlap.overlayfs import markers
from onlap.probing.trial import (
    NEEDS_PRIVILEGE,
    TRUSTED,
    Case,
    Scratch,
    Unsupported,
    attached,
    doing,
    expect,
    is_overlay,
    mounted,
    populate,
    read,
    use,
    write,
)
from onlap.trees.walk import opened


def overlay(scratch: Scratch) -> str:
    """A writable overlay of two lower layers, with its upper layer here, and all kinds of changes in it."""
    case = Case(scratch, "overlay")
    populate(case)
    with mounted(case.plan(), case.path("merged")) as merged:
        use(merged, case)
    return "by mount(2)" if kernel.layers_by() == kernel.LAYERS_BY_STRING else ""


def lowerdir_fd(_bench: Scratch) -> str:
    """Layers as descriptors; otherwise, the reason says how layers are passed instead."""
    way = kernel.layers_by()
    expect(way != kernel.LAYERS_BY_PROC, "needs Linux 6.13; /proc/self/fd strings are used instead")
    expect(way != kernel.LAYERS_BY_STRING, "needs Linux 6.13; the options of mount(2) are used instead")
    return ""


def redirect_dir(scratch: Scratch) -> str:
    """``redirect_dir=on``: a directory of a lower layer can be renamed, which otherwise fails with EXDEV."""
    case = Case(scratch, "redirect_dir")
    os.mkdir(case.path("bottom", "old"))
    write(case.path("bottom", "old", "file"), "bottom")
    with mounted(case.plan("redirect_dir=on"), case.path("merged")) as merged:
        with doing("rename a directory of a lower layer"):
            os.rename(os.path.join(merged, "old"), os.path.join(merged, "new"))
        expect(read(os.path.join(merged, "new", "file")) == "bottom", "a renamed directory lost its content")
    redirect = markers.get_xattr(case.path("upper", "new"), TRUSTED.redirect)
    expect(redirect is not None, "a renamed directory left no redirect")
    return ""


def metacopy(scratch: Scratch) -> str:
    """``metacopy=on``: a change of metadata does not copy the content."""
    case = Case(scratch, "metacopy")
    write(case.path("bottom", "file"), "bottom")
    with mounted(case.plan("metacopy=on"), case.path("merged")) as merged:
        os.chmod(os.path.join(merged, "file"), 0o640)
        expect(read(os.path.join(merged, "file")) == "bottom", "the file lost its content")
    mark = markers.get_xattr(case.path("upper", "file"), TRUSTED.metacopy)
    expect(mark is not None, "the kernel copied the content all the same")
    return ""


def index(scratch: Scratch) -> str:
    """``index=on``: hard links of a lower layer remain hard links when one is changed."""
    case = Case(scratch, "index")
    write(case.path("bottom", "one"), "bottom")
    os.link(case.path("bottom", "one"), case.path("bottom", "two"))
    with mounted(case.plan("index=on"), case.path("merged")) as merged:
        write(os.path.join(merged, "one"), "changed")
        linked = read(os.path.join(merged, "two")) == "changed"
    expect(linked, "the kernel turned it off: this filesystem has no file handles (name_to_handle_at)")
    return ""


def volatile(scratch: Scratch) -> str:
    """``volatile``: nothing is synced, and a directory in the workdir marks this."""
    case = Case(scratch, "volatile")
    with mounted(case.plan("volatile"), case.path("merged")) as merged:
        write(os.path.join(merged, "file"), "new")
        marked = os.path.isdir(case.path("work", "work", "incompat", "volatile"))
    expect(marked, "the kernel left no mark of it in the workdir")
    return ""


def data_only(scratch: Scratch) -> str:
    """Data-only layers (``datadir+``, Linux 6.8): a file has its content in a layer that is otherwise invisible."""
    case = Case(scratch, "data_only", "data")
    write(case.path("data", "blob"), "content")
    write(case.path("top", "file"), "")
    os.truncate(case.path("top", "file"), len("content"))
    with doing("set the xattrs"):
        os.setxattr(case.path("top", "file"), TRUSTED.metacopy, b"")
        os.setxattr(case.path("top", "file"), TRUSTED.redirect, b"/blob")
    with opened(case.path("data"), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) as data:
        # overlayfs.rst, "Metadata only copy up" has metacopy=on for such files; newer kernels do without.
        plan = case.plan("metacopy=on", f"datadir+=/proc/self/fd/{data}", writable=False)
        with mounted(plan, case.path("merged")) as merged:
            with doing("read a file by its redirect"):
                expect(read(os.path.join(merged, "file")) == "content", "the redirect leads elsewhere")
            expect(not os.path.exists(os.path.join(merged, "blob")), "the layer itself is visible")
    return ""


def xattr_whiteout(scratch: Scratch) -> str:
    """Whiteouts as empty files with an xattr (Linux 6.7), in a directory that is marked for them."""
    case = Case(scratch, "xattr_whiteout")
    for part in ("top", "bottom"):
        os.mkdir(case.path(part, "dir"))
        write(case.path(part, "dir", "gone"), "")
    with doing("set the xattrs"):
        os.setxattr(case.path("top", "dir"), TRUSTED.opaque, markers.OPAQUE_XATTR_WHITEOUTS)
        os.setxattr(case.path("top", "dir", "gone"), TRUSTED.whiteout, b"")
    with mounted(case.plan(writable=False), case.path("merged")) as merged:
        directory = os.path.join(merged, "dir")
        hidden = not os.listdir(directory) and not os.path.exists(os.path.join(directory, "gone"))
    expect(hidden, "the kernel shows it as a file")
    return ""


def idmapped(scratch: Scratch) -> str:
    """A lower layer as an idmapped mount: its files show other owners."""
    case = Case(scratch, "idmapped")
    write(case.path("top", "file"), "top")
    # User 1, since 65534 also stands for unmapped users.
    maps = (f"uidmap={os.geteuid()}:1:1", f"gidmap={os.getegid()}:1:1")
    with mounted(case.plan(*maps, writable=False), case.path("merged")) as merged:
        status = os.stat(os.path.join(merged, "file"))
    expect((status.st_uid, status.st_gid) == (1, 1), "the overlay does not show the mapped owner")
    return ""


def tmpfs(scratch: Scratch) -> str:
    """A tmpfs can be mounted."""
    case = Case(scratch, "tmpfs")
    try:
        fd = kernel.detached(Mount("tmpfs", "tmpfs"))
    except OnlapError as error:
        cause = error.__cause__
        if isinstance(cause, PermissionError):
            raise Unsupported(NEEDS_PRIVILEGE) from error
        if not isinstance(cause, OSError) or cause.errno != errno.ENOSYS:
            raise Unsupported(str(error)) from error
        with attached(Mount("tmpfs", "tmpfs"), case.path("merged")):
            write(case.path("merged", "file"), "new")
        return ""
    try:
        write(f"/proc/self/fd/{fd}/file", "new")
    finally:
        os.close(fd)
    return ""


# Trials that attach a mount, for a process in its own mount namespace. A detached mount as a layer is EINVAL before
# Linux 6.15 (fs/namespace.c: clone_private_mount checks that it is in the caller's namespace).


def xino(scratch: Scratch) -> str:
    """``xino=on``: with layers on two filesystems, all files have the overlay's st_dev."""
    case = Case(scratch, "xino")
    with attached(Mount("tmpfs", "tmpfs"), case.path("top")):
        write(case.path("top", "file"), "top")
        with mounted(case.plan("xino=on"), case.path("merged")) as merged:
            same = os.stat(os.path.join(merged, "file")).st_dev == os.stat(merged).st_dev
    expect(same, "the kernel turned it off")
    return "matters only for layers on several filesystems"


def overlay_on_overlay(scratch: Scratch) -> str:
    """An overlay can be a lower layer of another."""
    case = Case(scratch, "overlay_on_overlay")
    write(case.path("bottom", "file"), "bottom")
    with contextlib.ExitStack() as stack:
        lowers = None
        # OverlayFS stacks two deep; if the directory is on an overlay, that is the first.
        if not is_overlay(scratch.base):
            stack.enter_context(attached(case.plan(writable=False), case.path("merged")))
            lowers = (case.path("merged"), case.path("upper"))
        outer = Case(scratch, "overlay_on_overlay.outer")
        plan = (outer if lowers else case).plan(lowers=lowers, writable=False)
        merged = stack.enter_context(mounted(plan, outer.path("merged")))
        expect(read(os.path.join(merged, "file")) == "bottom", "a file of the lower overlay is missing")
    return "as a lower layer, two deep; never as the upper"


Trial = Callable[[Scratch], str]

# Trials that need the privilege to mount, and a working overlay.
ON_OVERLAY: dict[str, Trial] = {
    "redirect_dir": redirect_dir,
    "metacopy": metacopy,
    "index": index,
    "volatile": volatile,
    "lowerdir_fd": lowerdir_fd,
    "data_only": data_only,
    "xattr_whiteout": xattr_whiteout,
    "idmapped": idmapped,
}
ATTACHING: dict[str, Trial] = {"xino": xino, "overlay_on_overlay": overlay_on_overlay}
PRIVILEGED: dict[str, Trial] = {"overlay": overlay, "tmpfs": tmpfs, **ON_OVERLAY, **ATTACHING}
