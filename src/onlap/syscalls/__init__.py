"""The kernel, one thin typed function a call, without policy.

Each function raises :class:`OSError` with the kernel's errno and the path that it was about. Constants are copied from
the kernel's headers, which each module names. Higher-level behaviour does not belong here.
"""
