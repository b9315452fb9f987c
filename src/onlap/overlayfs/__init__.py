"""OverlayFS itself: the form of its options, its markers on disk, and what this kernel can do.

Source: the kernel's Documentation/filesystems/overlayfs.rst.
"""
