"""What this kernel and a directory can do, found by trial with the functions that Onlap mounts with.

Not called ``probe``: a package of that name would hide the function in ``onlap``.
"""
