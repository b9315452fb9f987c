"""The conformance suite for snapshotters, Onlap's own and others: public, and without pytest.

>>> from onlap.testing import MemoryFactory, run_suite
>>> ran = run_suite(MemoryFactory(), capabilities=())
>>> "commit_of_a_view_fails" in ran
True
"""

from __future__ import annotations

from onlap.testing.factories import MemoryFactory, NativeFactory, OverlayFactory
from onlap.testing.same import assert_same_tree, differences, read_tree
from onlap.testing.snapshotters import CAPABILITIES, Case, cases, run_suite
from onlap.testing.trees import Tree

__all__ = [
    "CAPABILITIES",
    "Case",
    "MemoryFactory",
    "NativeFactory",
    "OverlayFactory",
    "Tree",
    "assert_same_tree",
    "cases",
    "differences",
    "read_tree",
    "run_suite",
]
