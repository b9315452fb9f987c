"""What this kernel and a directory can do, found by trial with the functions that Onlap mounts with.

Not called ``probe``: that is the function, which a package of its name would hide in ``onlap``.
"""
