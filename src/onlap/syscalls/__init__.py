"""The kernel: one thin, typed function per system call, without policy.

Each function raises :class:`OSError` with the kernel's errno and the path concerned. Constants are copied from the
kernel headers that each module names. Higher-level behaviour does not belong here.
"""
