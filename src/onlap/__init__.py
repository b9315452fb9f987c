"""Onlap: OverlayFS for Python.

A snapshot engine for file trees. It keeps stacks of read-only layers and puts a writable view on top in about a
millisecond. What is written there becomes the next layer.

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
    from onlap import aio as aio
    from onlap.check.backups.restore import restore
    from onlap.check.backups.summary import Backup
    from onlap.check.findings import Finding, Report
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
    from onlap.snapshots.contexts import mounted
    from onlap.snapshots.contract import Cleaner, Differ, Info, Snapshotter
    from onlap.snapshots.native import NativeSnapshotter
    from onlap.snapshots.overlay import OverlaySnapshotter, Properties
    from onlap.snapshots.running.run import Done
    from onlap.snapshots.transfer.api import Exported, Imported
    from onlap.store import Progress, Store, open
    from onlap.trees.compare import Change
    from onlap.trees.meta import Meta
    from onlap.trees.usage import Usage
    from onlap.workspaces.api import Workspaces
    from onlap.workspaces.records import Checkpoint, Source
    from onlap.workspaces.workspace import Workspace

# PEP 562: a name is loaded when it is first used, so that a short command does not pay for what it never uses.
_MODULES = {
    "onlap.check.findings": "Finding Report",
    "onlap.check.backups.restore": "restore",
    "onlap.check.backups.summary": "Backup",
    "onlap.errors": (
        "AlreadyExists Busy Canceled DataLoss DigestMismatch FailedPrecondition Internal InvalidArgument NotFound "
        "OnlapError PermissionDenied ResourceExhausted Unavailable Unimplemented"
    ),
    "onlap.layers.apply.archive": "Applied Limits",
    "onlap.layers.diff.write": "Written",
    "onlap.mounts.plan": "Mount",
    "onlap.probing.probe": "Probe probe",
    "onlap.probing.trial": "Feature",
    "onlap.snapshots.contexts": "mounted",
    "onlap.snapshots.contract": "Cleaner Differ Info Snapshotter",
    "onlap.snapshots.native": "NativeSnapshotter",
    "onlap.snapshots.overlay": "OverlaySnapshotter Properties",
    "onlap.snapshots.running.run": "Done",
    "onlap.snapshots.transfer.api": "Exported Imported",
    "onlap.store": "Progress Store open",
    "onlap.trees.compare": "Change",
    "onlap.trees.meta": "Meta",
    "onlap.trees.usage": "Usage",
    "onlap.workspaces.api": "Workspaces",
    "onlap.workspaces.records": "Checkpoint Source",
    "onlap.workspaces.workspace": "Workspace",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "AlreadyExists",
    "Applied",
    "Backup",
    "Busy",
    "Canceled",
    "Change",
    "Checkpoint",
    "Cleaner",
    "DataLoss",
    "Differ",
    "DigestMismatch",
    "Done",
    "Exported",
    "FailedPrecondition",
    "Feature",
    "Finding",
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
    "Report",
    "ResourceExhausted",
    "Snapshotter",
    "Source",
    "Store",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "Workspace",
    "Workspaces",
    "Written",
    "__version__",
    "mounted",
    "open",
    "probe",
    "restore",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "aio":
        return import_module("onlap.aio")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'onlap' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
