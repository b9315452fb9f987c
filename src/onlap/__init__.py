"""Onlap: OverlayFS for Python.

A snapshot engine for file trees: stacks of read-only layers, a writable view on top in about a millisecond, and what
was written there becomes the next layer.

>>> import onlap, tempfile
>>> directory = tempfile.TemporaryDirectory()
>>> with onlap.open(directory.name + "/root", snapshotter="native") as store:
...     with store.build("base") as tree:
...         _ = (tree / "greeting").write_text("hello")
...     with store.scratch("base") as tree:
...         (tree / "greeting").read_text()
'hello'
>>> directory.cleanup()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onlap._version import __version__

if TYPE_CHECKING:
    from onlap.errors import (
        AlreadyExists,
        Busy,
        Canceled,
        DataLoss,
        DigestMismatch,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        NotFound,
        OnlapError,
        PermissionDenied,
        ResourceExhausted,
        Unavailable,
        Unimplemented,
    )
    from onlap.layers.apply.archive import Applied, Limits
    from onlap.layers.diff.write import Written
    from onlap.mounts.plan import Mount
    from onlap.probing.probe import Probe, probe
    from onlap.probing.trial import Feature
    from onlap.snapshots.contract import Cleaner, Differ, Info, Snapshotter
    from onlap.snapshots.native import NativeSnapshotter
    from onlap.snapshots.overlay import OverlaySnapshotter, Properties
    from onlap.snapshots.working import mounted
    from onlap.store import Exported, Imported, Progress, Store, open
    from onlap.trees.compare import Change
    from onlap.trees.meta import Meta
    from onlap.trees.usage import Usage

# PEP 562: each name is loaded when somebody asks for it, so that a short command does not pay for what it never uses.
_ERRORS = (
    "AlreadyExists Busy Canceled DataLoss DigestMismatch FailedPrecondition Internal InvalidArgument NotFound "
    "OnlapError PermissionDenied ResourceExhausted Unavailable Unimplemented"
)
_WHERE = {
    **dict.fromkeys(_ERRORS.split(), "onlap.errors"),
    "Applied": "onlap.layers.apply.archive",
    "Change": "onlap.trees.compare",
    "Cleaner": "onlap.snapshots.contract",
    "Differ": "onlap.snapshots.contract",
    "Exported": "onlap.store",
    "Feature": "onlap.probing.trial",
    "Imported": "onlap.store",
    "Info": "onlap.snapshots.contract",
    "Limits": "onlap.layers.apply.archive",
    "Meta": "onlap.trees.meta",
    "Mount": "onlap.mounts.plan",
    "NativeSnapshotter": "onlap.snapshots.native",
    "OverlaySnapshotter": "onlap.snapshots.overlay",
    "Probe": "onlap.probing.probe",
    "Progress": "onlap.store",
    "Properties": "onlap.snapshots.overlay",
    "Snapshotter": "onlap.snapshots.contract",
    "Store": "onlap.store",
    "Usage": "onlap.trees.usage",
    "Written": "onlap.layers.diff.write",
    "mounted": "onlap.snapshots.working",
    "open": "onlap.store",
    "probe": "onlap.probing.probe",
}

__all__ = [
    "AlreadyExists",
    "Applied",
    "Busy",
    "Canceled",
    "Change",
    "Cleaner",
    "DataLoss",
    "Differ",
    "DigestMismatch",
    "Exported",
    "FailedPrecondition",
    "Feature",
    "Imported",
    "Info",
    "Internal",
    "InvalidArgument",
    "Limits",
    "Meta",
    "Mount",
    "NativeSnapshotter",
    "NotFound",
    "OnlapError",
    "OverlaySnapshotter",
    "PermissionDenied",
    "Probe",
    "Progress",
    "Properties",
    "ResourceExhausted",
    "Snapshotter",
    "Store",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "Written",
    "__version__",
    "mounted",
    "open",
    "probe",
]


def __getattr__(name: str) -> object:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'onlap' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(where), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
