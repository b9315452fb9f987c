"""Trials that mount: what OverlayFS can do here. Each takes a bench and gives a note, or raises :class:`No`.

A trial of a mount option looks at the option's *effect*, since the kernel turns some options off by itself:
``index``, ``xino`` and ``metacopy`` where the upper filesystem has no file handles or xattrs.

Source: the kernel's Documentation/filesystems/overlayfs.rst; fs/overlayfs/params.c.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from onlap.overlayfs import markers
from onlap.overlayfs.trials.bench import (
    BY_FD,
    BY_PROC,
    BY_STRING,
    NEEDS_PRIVILEGE,
    TRUSTED,
    Bench,
    Case,
    No,
    attached,
    doing,
    expect,
    is_overlay,
    mounted,
    mounted_overlay,
    populate,
    read,
    use,
    write,
)
from onlap.syscalls import mount as api


def overlay(bench: Bench) -> str:
    """A writable overlay of two lower layers, with its upper layer here, used in earnest."""
    case = Case(bench, "overlay")
    populate(case.directory)
    with mounted_overlay(bench, case) as merged:
        use(merged, case.directory)
    return "by mount(2)" if bench.way == BY_STRING else ""


def lowerdir_fd(bench: Bench) -> str:
    """Layers as descriptors; where that does not work, the reason tells whether /proc/self/fd/N does."""
    try:
        return _lowerdir(bench, BY_FD)
    except No as no:
        if bench.way != BY_PROC:
            raise
        _lowerdir(bench, BY_PROC)
        raise No(f"{no}; by /proc/self/fd strings it works") from no


def _lowerdir(bench: Bench, way: str) -> str:
    case = Case(bench, f"lowerdir_{way}")
    write(case.path("bottom", "file"), "bottom")
    with mounted_overlay(bench._replace(way=way), case) as merged:
        expect(read(os.path.join(merged, "file")) == "bottom", "a file of a lower layer is not in it")
    return ""


def redirect_dir(bench: Bench) -> str:
    """``redirect_dir=on``: a directory of a lower layer can be renamed, where it else gives EXDEV."""
    case = Case(bench, "redirect_dir")
    os.mkdir(case.path("bottom", "old"))
    write(case.path("bottom", "old", "file"), "bottom")
    with mounted_overlay(bench, case, "redirect_dir=on") as merged:
        with doing("rename a directory of a lower layer"):
            os.rename(os.path.join(merged, "old"), os.path.join(merged, "new"))
        expect(read(os.path.join(merged, "new", "file")) == "bottom", "a renamed directory lost its content")
    redirect = markers.get_xattr(case.path("upper", "new"), TRUSTED.redirect)
    expect(redirect is not None, "a renamed directory left no redirect")
    return ""


def metacopy(bench: Bench) -> str:
    """``metacopy=on``: a change of metadata does not copy the content."""
    case = Case(bench, "metacopy")
    write(case.path("bottom", "file"), "bottom")
    with mounted_overlay(bench, case, "metacopy=on") as merged:
        os.chmod(os.path.join(merged, "file"), 0o640)
        expect(read(os.path.join(merged, "file")) == "bottom", "the file lost its content")
    mark = markers.get_xattr(case.path("upper", "file"), TRUSTED.metacopy)
    expect(mark is not None, "the kernel copied the content all the same")
    return ""


def index(bench: Bench) -> str:
    """``index=on``: hard links of a lower layer stay hard links when one is changed."""
    case = Case(bench, "index")
    write(case.path("bottom", "one"), "bottom")
    os.link(case.path("bottom", "one"), case.path("bottom", "two"))
    with mounted_overlay(bench, case, "index=on") as merged:
        write(os.path.join(merged, "one"), "changed")
        linked = read(os.path.join(merged, "two")) == "changed"
    expect(linked, "the kernel turned it off: this filesystem has no file handles (name_to_handle_at)")
    return ""


def volatile(bench: Bench) -> str:
    """``volatile``: nothing is written out, and a directory in the workdir says so."""
    case = Case(bench, "volatile")
    with mounted_overlay(bench, case, "volatile") as merged:
        write(os.path.join(merged, "file"), "new")
        marked = os.path.isdir(case.path("work", "work", "incompat", "volatile"))
    expect(marked, "the kernel left no mark of it in the workdir")
    return ""


def data_only(bench: Bench) -> str:
    """Data-only layers: a file of a lower layer has its content in a layer that is else not seen."""
    case = Case(bench, "data_only", "data")
    write(case.path("data", "blob"), "content")
    write(case.path("top", "file"), "")
    os.truncate(case.path("top", "file"), len("content"))
    with doing("set the xattrs"):
        os.setxattr(case.path("top", "file"), TRUSTED.metacopy, b"")
        os.setxattr(case.path("top", "file"), TRUSTED.redirect, b"/blob")
    # overlayfs.rst, "Metadata only copy up" has metacopy=on for such files; newer kernels do without.
    with mounted_overlay(bench, case, "metacopy=on", data=(case.path("data"),), writable=False) as merged:
        with doing("read a file by its redirect"):
            expect(read(os.path.join(merged, "file")) == "content", "the redirect leads elsewhere")
        expect(not os.path.exists(os.path.join(merged, "blob")), "the layer is seen by itself")
    return ""


def xattr_whiteout(bench: Bench) -> str:
    """A whiteout that is an empty file with an xattr (Linux 6.7), in a directory that is marked for it."""
    case = Case(bench, "xattr_whiteout")
    for part in ("top", "bottom"):
        os.mkdir(case.path(part, "dir"))
        write(case.path(part, "dir", "gone"), "")
    with doing("set the xattrs"):
        os.setxattr(case.path("top", "dir"), TRUSTED.opaque, markers.OPAQUE_XATTR_WHITEOUTS)
        os.setxattr(case.path("top", "dir", "gone"), TRUSTED.whiteout, b"")
    with mounted_overlay(bench, case, writable=False) as merged:
        directory = os.path.join(merged, "dir")
        hidden = not os.listdir(directory) and not os.path.exists(os.path.join(directory, "gone"))
    expect(hidden, "the kernel shows it as a file")
    return ""


def tmpfs(bench: Bench) -> str:
    """A tmpfs can be mounted."""
    if bench.way == BY_STRING:
        case = Case(bench, "tmpfs")
        with mounted("tmpfs", case.path("merged")) as where:
            write(os.path.join(where, "file"), "new")
        return ""
    try:
        fs = api.fsopen("tmpfs")
    except PermissionError as error:
        raise No(NEEDS_PRIVILEGE) from error
    try:
        api.fsconfig_create(fs)
        fd = api.fsmount(fs)
    finally:
        os.close(fs)
    try:
        write(f"/proc/self/fd/{fd}/file", "new")
    finally:
        os.close(fd)
    return ""


# Overlay: trials that attach a mount, for a process in a mount namespace of its own. A detached mount as a
# layer is EINVAL in kernels before 6.15 (fs/namespace.c, clone_private_mount asks whether it is in the
# caller's namespace).


def xino(bench: Bench) -> str:
    """``xino=on``: with layers on two filesystems, all files have the overlay's own st_dev."""
    case = Case(bench, "xino")
    with mounted("tmpfs", case.path("top")):
        write(case.path("top", "file"), "top")
        with mounted_overlay(bench, case, "xino=on") as merged:
            same = os.stat(os.path.join(merged, "file")).st_dev == os.stat(merged).st_dev
    expect(same, "the kernel turned it off")
    return "matters only for layers on several filesystems"


def overlay_on_overlay(bench: Bench) -> str:
    """An overlay can be a lower layer of another."""
    inner = Case(bench, "overlay_on_overlay", "below")
    write(inner.path("bottom", "file"), "bottom")
    with contextlib.ExitStack() as stack:
        case, lowers = inner, inner.lowers
        # OverlayFS stacks two deep; where the directory is on an overlay, that one is the first.
        if not is_overlay(bench.base):
            below = mounted_overlay(bench, inner, writable=False, attach_at=inner.path("below"))
            case = Case(bench, "overlay_on_overlay.outer")
            lowers = (stack.enter_context(below), case.path("bottom"))
        merged = stack.enter_context(mounted_overlay(bench, case, lowers=lowers, writable=False))
        expect(read(os.path.join(merged, "file")) == "bottom", "a file of the overlay below is not in it")
    return "as a lower layer, two deep; never as the upper"


def idmapped(bench: Bench, namespace: int, uid: int) -> str:
    """A lower layer by an idmapped mount: its files have other owners.

    Args:
        bench: how to try.
        namespace: a descriptor of a user namespace that maps our own user and group to ``uid``.
        uid: the owner to see.
    """
    case = Case(bench, "idmapped", "mapped")
    write(case.path("top", "file"), "top")
    mapped = api.open_tree(case.path("top"))
    try:
        with doing("map its owners (mount_setattr)"):
            api.mount_setattr(mapped, set_attributes=api.MOUNT_ATTR_IDMAP, userns_fd=namespace)
        with (
            attached(mapped, case.path("mapped")) as top,
            mounted_overlay(bench, case, lowers=(top, case.path("bottom"))) as merged,
        ):
            status = os.stat(os.path.join(merged, "file"))
    finally:
        os.close(mapped)
    expect((status.st_uid, status.st_gid) == (uid, uid), "the overlay does not show the mapped owner")
    return ""


Trial = Callable[[Bench], str]

# Trials that need the privilege to mount, and an overlay that works.
ON_OVERLAY: dict[str, Trial] = {
    "redirect_dir": redirect_dir,
    "metacopy": metacopy,
    "index": index,
    "volatile": volatile,
    "lowerdir_fd": lowerdir_fd,
    "data_only": data_only,
    "xattr_whiteout": xattr_whiteout,
}
ATTACHING: dict[str, Trial] = {"xino": xino, "overlay_on_overlay": overlay_on_overlay}
PRIVILEGED: dict[str, Trial] = {"overlay": overlay, "tmpfs": tmpfs, **ON_OVERLAY, **ATTACHING}
