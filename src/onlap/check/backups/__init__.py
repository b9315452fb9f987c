"""A root as one archive, and a root made from one."""
