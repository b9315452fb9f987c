"""Trials of what a kernel and a directory can do: each mounts or writes something small, and looks.

Nothing here asks for a version. An overlay is mounted detached, so that no mount appears anywhere, where the
kernel has that; what must attach a mount runs in a process with a mount namespace of its own.
"""
