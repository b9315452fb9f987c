"""A mount as a value: what to mount, without mounting it.

It can be rendered as the legacy option string, for mount(2), containerd and Docker.
"""

from __future__ import annotations

from typing import NamedTuple

from onlap.overlayfs import options


class Mount(NamedTuple):
    """One mount, as containerd's ``mount.Mount``, with an overlay's layers kept apart.

    Attributes:
        type: ``"overlay"``, ``"bind"``, or another filesystem's name.
        source: what mount(2) gets as its source: the directory of a bind, ``"overlay"`` for an overlay.
        target: a directory below the mount point of the plan; usually empty.
        lowers: an overlay's lower layers, topmost first.
        upper: an overlay's upperdir, None if it is read-only.
        work: an overlay's workdir, on the same mount as ``upper``.
        flags: every other option, as ``"ro"``, ``"rbind"``, ``"index=off"``.
    """

    type: str
    source: str
    target: str = ""
    lowers: tuple[str, ...] = ()
    upper: str | None = None
    work: str | None = None
    flags: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """containerd's option strings; paths are escaped for mount(2).

        Source: containerd v1.7.24, snapshots/overlay/overlay.go, ``mounts``.
        """
        rendered = list(self.flags)
        if self.work is not None:
            rendered.append("workdir=" + options.escape(self.work))
        if self.upper is not None:
            rendered.append("upperdir=" + options.escape(self.upper))
        if self.lowers:
            rendered.append("lowerdir=" + options.join_lowers(self.lowers))
        return rendered

    @property
    def readonly(self) -> bool:
        """Whether nothing can be written through it."""
        return "ro" in self.flags or (self.type == "overlay" and self.upper is None)

    @property
    def needs_no_mount(self) -> bool:
        """Whether its source is the tree itself: a read-write bind of a directory."""
        return self.type == "bind" and not self.readonly and not self.target


# Options of mount(8) that make any mount a bind.
BIND_FLAGS = ("bind", "rbind")


def is_bind(mount: Mount) -> bool:
    """Whether it shows its source, a directory, and not a filesystem of its own."""
    return mount.type == "bind" or any(flag in BIND_FLAGS for flag in mount.flags)


def bind(directory: str, *, readonly: bool = False) -> Mount:
    """A bind of ``directory``, with containerd's flags."""
    return Mount("bind", directory, flags=("ro" if readonly else "rw", "rbind"))


def overlay(
    lowers: tuple[str, ...], *, upper: str | None = None, work: str | None = None, flags: tuple[str, ...] = ()
) -> Mount:
    """An overlay; ``lowers`` topmost first."""
    return Mount("overlay", "overlay", lowers=lowers, upper=upper, work=work, flags=flags)
