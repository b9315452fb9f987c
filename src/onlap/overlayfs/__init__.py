"""OverlayFS itself: its options, its markers on disk, and the merged view of layers in userspace.

Source: the kernel's Documentation/filesystems/overlayfs.rst.
"""
